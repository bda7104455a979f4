"""Kernel calls as the source of a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchlinop.autodiff.replay.recording import Call


def write(calls: list[Call], result: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function of ``x`` that makes these calls and frees what it can early."""
    names = {id(x): "x"}
    scope: dict[str, Any] = {}

    def constant(value: Any, prefix: str) -> str:
        name = f"{prefix}{len(scope)}"
        scope[name] = value
        return name

    def spell(value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = constant(value.detach(), "c")
            return names[id(value)]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(spell(v) for v in value) + "]"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return constant(value, "k")

    def target(result: Any) -> str:
        if isinstance(result, (list, tuple)):
            return "(" + "".join(target(r) + ", " for r in result) + ")"
        if not isinstance(result, Tensor):
            return "_"
        name = names.setdefault(id(result), f"t{len(names)}")
        return "_" if name in scope else name  # memory from outside was written into

    lines = []
    for call, dead in zip(calls, _last_uses(calls, keep={id(x), id(result)}), strict=True):
        arguments = [spell(a) for a in call.args]
        arguments += [f"{key}={spell(a)}" for key, a in call.kwargs.items()]
        kernel = constant(call.func._op, "f")
        lines.append(f"{target(call.result)} = {kernel}({', '.join(arguments)})")
        temporary = [names[i] for i in dead if names[i].startswith("t")]
        if temporary:
            lines.append("del " + ", ".join(temporary))
    lines.append(f"return {names[id(result)]}")
    source = "def run(x):\n    " + "\n    ".join(lines)
    exec(compile(source, "<replayed kernels>", "exec"), scope)
    return scope.pop("run")  # which refers to scope: no reference cycle


def _last_uses(calls: list[Call], *, keep: set[int]) -> list[list[int]]:
    """For each call, the tensors that no later one mentions."""
    seen = set(keep)
    dead = []
    for call in reversed(calls):
        mentioned = dict.fromkeys(id(t) for t in call.inputs() + call.outputs())
        dead.append([i for i in mentioned if i not in seen])
        seen.update(mentioned)
    return dead[::-1]
