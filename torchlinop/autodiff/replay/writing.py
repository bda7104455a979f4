"""Kernel calls as the source of a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchlinop.autodiff.replay.recording import Call, Value


def write(calls: list[Call], result: Value, x: Value) -> Callable[[Tensor], Tensor]:
    """Return a function of ``x`` that makes these calls and frees what it can early."""
    names = {x: "x"}
    scope: dict[str, Any] = {}

    def constant(value: Any, prefix: str) -> str:
        name = f"{prefix}{len(scope)}"
        scope[name] = value
        return name

    def spell(value: Any) -> str:
        if isinstance(value, Value):
            if value not in names:
                assert value.constant is not None
                names[value] = constant(value.constant.detach(), "c")
            return names[value]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join([spell(v) for v in value]) + "]"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return constant(value, "k")

    def target(result: Any) -> str:
        if isinstance(result, (list, tuple)):
            return "(" + "".join([target(r) + ", " for r in result]) + ")"
        if not isinstance(result, Value):
            return "_"
        name = names.setdefault(result, f"t{len(names)}")
        return "_" if name in scope else name  # memory from outside was written into

    lines = []
    for call, dead in zip(calls, _last_uses(calls, keep={x, result}), strict=True):
        arguments = [spell(a) for a in call.args]
        arguments += [f"{key}={spell(a)}" for key, a in call.kwargs.items()]
        kernel = constant(call.func._op, "f")
        lines.append(f"{target(call.result)} = {kernel}({', '.join(arguments)})")
        temporary = [names[v] for v in dead if names[v].startswith("t")]
        if temporary:
            lines.append(" = ".join(temporary) + " = None")
    lines.append(f"return {names[result]}")
    source = "def run(x):\n    " + "\n    ".join(lines)
    exec(compile(source, "<replayed kernels>", "exec"), scope)
    run: Callable[[Tensor], Tensor] = scope.pop("run")  # no cycle: run refers to scope
    return run


def _last_uses(calls: list[Call], *, keep: set[Value]) -> list[list[Value]]:
    """For each call, the values that no later one mentions."""
    seen = set(keep)
    dead = []
    for call in reversed(calls):
        mentioned = dict.fromkeys([*call.inputs, *call.outputs])
        dead.append([v for v in mentioned if v not in seen])
        seen.update(mentioned)
    return dead[::-1]
