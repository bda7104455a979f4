"""The conditions under which a model is evaluated for its derivatives."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from torchlinop.autodiff.interruptible import in_force, is_in_force
from torchlinop.autodiff.rules import Corrections, ForwardCorrections, SecondOrderRules

#: held while a model is evaluated or looked at: some flags that are set belong to the
#: whole process
EXCLUSIVE = threading.RLock()

if hasattr(os, "register_at_fork"):
    # a child has no other thread that could end what it has begun, and release the lock
    os.register_at_fork(
        before=EXCLUSIVE.acquire,
        after_in_parent=EXCLUSIVE.release,
        after_in_child=EXCLUSIVE.release,
    )


@contextmanager
def recording(
    device: torch.device, *, rules: bool = True, draws: bool = True, forward: bool = False
) -> Iterator[None]:
    """Evaluate a model such that its second derivatives exist, leaving no trace.

    Gradient mode is on, automatic mixed precision off, fused attention replaced by the
    explicit formula, nothing is compiled or recomputed later (checkpoints), and the
    random states (Python's, NumPy's, torch's) are restored on the way out.

    Parameters
    ----------
    device
        Where the model is.
    rules
        Whether rules for cheap second derivatives are in force.
    draws
        Whether Python's or NumPy's random numbers may be drawn; to save and restore their
        states takes 80 microseconds.
    forward
        Whether forward mode is turned off where gradients are, which torch does not: not
        where a model uses forward mode itself.
    """
    with EXCLUSIVE:
        before = _State(device, draws)
        try:
            try:
                torch._C._set_grad_enabled(True)
                corrections = ForwardCorrections if forward else Corrections
                mode = SecondOrderRules() if rules else corrections()
                with _exact(device), _uncompiled(), _without_checkpoints(), in_force(mode):
                    yield
            finally:
                before.restore()
        except BaseException:  # an interrupt, perhaps while that was being restored
            before.restore()
            raise


class _State:
    """What holds in a thread, to be restored also where an interrupt fell in between.

    A context whose ``__enter__`` was interrupted is not left by anybody else.
    """

    def __init__(self, device: torch.device, draws: bool) -> None:
        self._device = device
        self._host = (random.getstate(), np.random.get_state()) if draws else None
        self._random = torch.get_rng_state()
        self._random_there = (
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        )
        self._gradients = torch.is_grad_enabled()
        self._forward_gradients = torch._C._is_fwd_grad_enabled()
        self._compiler = sys.modules.get("torch._dynamo.eval_frame")
        self._stance = getattr(self._compiler, "_stance", None)

    def restore(self) -> None:
        """Restore what is not as it was."""
        torch._C._set_grad_enabled(self._gradients)
        torch._C._set_fwd_grad_enabled(self._forward_gradients)
        if getattr(self._compiler, "_stance", None) is not self._stance:
            self._compiler._set_stance(self._stance)  # type: ignore[union-attr]
        if self._host is not None:
            random.setstate(self._host[0])
            np.random.set_state(self._host[1])
        torch.set_rng_state(self._random)
        if self._random_there is not None:
            torch.cuda.set_rng_state(self._random_there, self._device)


@contextmanager
def _in_full(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Record all that is computed, in the precision of what it is computed from."""
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type):
        return _in_full(device)
    return nullcontext()


def _uncompiled() -> AbstractContextManager[Any]:
    """Run what torch.compile made eagerly; nobody pays who has not imported it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


# ------------------------------------------------------------------- checkpoints

_reentrant: Any = torch.utils.checkpoint.CheckpointFunction
_hook: Callable = torch.utils.checkpoint._checkpoint_hook
#: threads that record, for which checkpoints are off
_recorders: set[int] = set()


class _Reentrant:
    """In the place of torch's function: calls directly in a thread that records."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        if threading.get_ident() in _recorders:
            return function(*args)
        return _reentrant.apply(function, preserve_rng_state, *args)


def _hook_unless_recording(frame: Any) -> AbstractContextManager[Any]:
    if threading.get_ident() in _recorders:
        return nullcontext()
    hook: AbstractContextManager[Any] = _hook(frame)
    return hook


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Keep what ``torch.utils.checkpoint`` would compute again, in this thread.

    It would do so in every product, and outside of the rules that held when the model
    was recorded.
    """
    if is_in_force(Corrections):  # within another recording
        yield
        return
    thread = threading.get_ident()
    module: Any = torch.utils.checkpoint
    try:
        _recorders.add(thread)
        module.CheckpointFunction = _Reentrant
        module._checkpoint_hook = _hook_unless_recording
        yield
    finally:
        _recorders.discard(thread)
        module.CheckpointFunction, module._checkpoint_hook = _reentrant, _hook
