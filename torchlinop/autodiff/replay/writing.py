"""Kernel calls as the source of a Python function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import Tensor

from torchlinop.autodiff.replay.recording import Call, Value, values_in


def write(calls: list[Call], result: Value, x: Value) -> Callable[[Tensor], Tensor]:
    """Return a function of ``x`` that makes these calls and frees what it can early."""
    text = _Text(x)
    lines = []
    for call, dead in zip(calls, _last_uses(calls, keep={x, result}), strict=True):
        arguments = [text.spelled(a) for a in call.args]
        arguments += [f"{key}={text.spelled(a)}" for key, a in call.kwargs.items()]
        kernel = text.constant(call.func._op, "f")
        lines.append(f"{text.target(call.result)} = {kernel}({', '.join(arguments)})")
        temporary = [name for v in dead if (name := text.names[v]).startswith("t")]
        if temporary:
            lines.append(" = ".join(temporary) + " = None")
    lines.append(f"return {text.names[result]}")
    source = "def run(x):\n    " + "\n    ".join(lines)
    exec(_compiled(source), text.scope)
    run: Callable[[Tensor], Tensor] = text.scope.pop("run")  # which refers to the scope
    return run


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> CodeType:
    """Compile a text, which is the same for all batches of a network."""
    return compile(source, "<replayed kernels>", "exec")


class _Text:
    """Names of values, and of the objects that a function refers to."""

    def __init__(self, x: Value) -> None:
        self.names = {x: "x"}
        self.scope: dict[str, Any] = {}

    def constant(self, value: Any, prefix: str) -> str:
        """Give an object a name."""
        name = f"{prefix}{len(self.scope)}"
        self.scope[name] = value
        return name

    def spelled(self, value: Any) -> str:
        """An argument of a call."""
        if isinstance(value, Value):
            if value not in self.names:
                assert value.constant is not None
                self.names[value] = self.constant(value.constant.detach(), "c")
            return self.names[value]
        if isinstance(value, (list, tuple)) and values_in(value):
            return "[" + ", ".join([self.spelled(v) for v in value]) + "]"
        if value is None or isinstance(value, bool) or value in (0, 1, -1):
            return repr(value)
        return self.constant(value, "k")  # sizes, too: they differ from batch to batch

    def target(self, result: Any) -> str:
        """What a call's result is assigned to."""
        if isinstance(result, (list, tuple)):
            return "(" + "".join([self.target(r) + ", " for r in result]) + ")"
        if not isinstance(result, Value):
            return "_"
        name = self.names.setdefault(result, f"t{len(self.names)}")
        return "_" if name in self.scope else name  # memory from outside was written into


def _last_uses(calls: list[Call], *, keep: set[Value]) -> list[list[Value]]:
    """For each call, the values that no later one mentions."""
    seen = set(keep)
    dead = []
    for call in reversed(calls):
        mentioned = dict.fromkeys([*call.inputs, *call.outputs])
        dead.append([v for v in mentioned if v not in seen])
        seen.update(mentioned)
    return dead[::-1]
