"""Function modes that an interrupt leaves without effect.

Torch takes a mode off its stack while the mode handles a function, and puts it back when
the frames of an exception are freed: where an interrupt falls in between, the mode is
missing when its context ends, and comes back afterwards. So the end of a context does not
ask for it, a mode whose context is over does nothing, and the next context removes it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _push_mode


class InterruptibleMode(TorchFunctionMode):
    """A function mode for :func:`in_force`."""

    #: whether its context has ended
    over = False

    @abstractmethod
    def handle(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a torch function, or what stands for it."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Handle the call while the context lasts."""
        if self.over:
            return func(*args, **(kwargs or {}))
        return self.handle(func, args, kwargs or {})


@contextmanager
def in_force(mode: InterruptibleMode) -> Iterator[None]:
    """Let a mode handle all calls of torch functions in this thread."""
    while (top := _get_current_function_mode()) is not None and (
        isinstance(top, InterruptibleMode) and top.over
    ):
        torch._C._pop_torch_function_stack()
    depth = torch._C._len_torch_function_stack()
    try:
        _push_mode(mode)
        yield
    finally:
        mode.over = True
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


def is_in_force(kind: type[InterruptibleMode]) -> bool:
    """Whether this thread is in the context of such a mode."""
    depth = torch._C._len_torch_function_stack()
    modes = (torch._C._get_function_stack_at(i) for i in range(depth))
    return any(isinstance(mode, kind) and not mode.over for mode in modes)
