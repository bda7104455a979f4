"""A plain torch function as what an operator linearizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop._space import ParameterSpace
from torchlinop._watch import Watch
from torchlinop.autodiff.diagnose import explain, is_missing_derivative
from torchlinop.autodiff.recording import recording
from torchlinop.data import Batch
from torchlinop.sources.checks import require_real
from torchlinop.sources.options import Options
from torchlinop.sources.protocol import Result, record_with_rules


class TorchFunction:
    """A torch function at a point, on one batch without data.

    Parameters
    ----------
    f
        A function of ``x``.
    x
        A tensor, or a dict or list of tensors.
    """

    def __init__(self, f: Callable[[Any], Tensor], x: Any) -> None:
        if not callable(f):
            raise TypeError(f"f has to be a function, got {type(f).__name__}.")
        self.f = f
        self._kind: Any
        if isinstance(x, Tensor):
            named, self._kind = {"x": x}, None
        elif isinstance(x, Mapping):
            named, self._kind = dict(x), dict
        elif isinstance(x, (list, tuple)):
            named, self._kind = {str(i): t for i, t in enumerate(x)}, type(x)
        else:
            raise TypeError(
                f"x has to be a tensor, or a dict or list of tensors, got "
                f"{type(x).__name__}."
            )
        self._x = named
        self.space = ParameterSpace(named)
        self.options = Options(cache=True)
        self.batches = _OneBatch()
        self.looks = 0
        self.survey()

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves that share the memory of ``x``."""
        return [t.detach().requires_grad_() for t in self._x.values()]

    def predict(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        """``f`` at the leaves."""
        if self._kind is None:
            value = self.f(leaves[0])
        elif self._kind is dict:
            value = self.f(dict(zip(self._x, leaves, strict=True)))
        else:
            value = self.f(self._kind(leaves))
        if not isinstance(value, Tensor):
            raise TypeError(f"f has to return a tensor, got {type(value).__name__}.")
        return require_real(value, "f")

    def differential(self, leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """``f`` at the leaves, which has to be a scalar, and 1."""
        value = self.predict(leaves, batch)
        if value.numel() != 1:
            raise ValueError(
                "The Hessian is that of a scalar function, but f returned shape "
                f"{tuple(value.shape)}. For a vector-valued function use "
                "JacobianLinearOperator.from_function."
            )
        return value, torch.ones_like(value)

    def draws(self, batch: Batch) -> bool:
        """``f`` is not known."""
        return True

    def require_unchanged(self, batch: Batch) -> None:
        """There is no data."""

    def record(
        self, batch: Batch, build: Callable[[list[Tensor]], Result], *, order: int
    ) -> Result:
        """Run ``build(leaves)``, which evaluates ``f``, for its graph."""
        return record_with_rules(self, batch, build, order)

    def explained(self, error: Exception, batch: Batch, *, order: int) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""
        if not is_missing_derivative(error):
            return error
        leaves = self.leaves()
        with recording(self.space.device, rules=False):
            return explain(error, self.f, lambda: self.predict(leaves, batch), order)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the watch behind: a copy looks anew."""
        return {**vars(self), "_watch": None}

    def changed(self) -> bool:
        """Whether ``x`` has changed since the last look."""
        return self._watch is None or self._watch.changed()

    def survey(self) -> None:
        """Look at ``x`` anew."""
        self._watch = Watch(self._x.values())
        self.looks += 1


class _OneBatch:
    """One batch without data."""

    num_batches = 1
    shuffles = False
    lasts = True

    def __iter__(self) -> Iterator[Batch]:
        yield Batch(0, None, None, 1, ())

    def require_order(self) -> None:
        """There is only one order."""

    def rest(self) -> None:
        """Nothing is kept."""
