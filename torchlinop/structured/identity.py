"""The identity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.structured.base import StructuredLinearOperator, damped_inverse
from torchlinop.structured.diagonal import DiagonalLinearOperator


class IdentityLinearOperator(StructuredLinearOperator):
    """The identity on a parameter space.

    Parameters
    ----------
    shapes
        Shapes of the tensors whose entries a vector holds, ``[p.shape for p in params]``,
        or ``[(n,)]`` for the identity on vectors of length ``n``.
    device
        Where the operands of this operator live.
    dtype
        A torch dtype: float32, float64, complex64 or complex128.

    Raises
    ------
    TypeError
        ``shapes`` is not a sequence of shapes.

    Examples
    --------
    >>> import torch, torchlinop
    >>> identity = torchlinop.IdentityLinearOperator([(2, 2), (2,)], "cpu", torch.float64)
    >>> identity.shape
    (6, 6)
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        try:
            n = sum(math.prod(int(size) for size in shape) for shape in shapes)
        except TypeError as error:
            raise TypeError(
                "shapes has to be a list of shapes, for instance [p.shape for p in "
                f"params] or [(n,)], got {shapes!r}."
            ) from error
        if n < 0:
            raise ValueError(f"The sizes in shapes have to be at least 0, got {shapes!r}.")
        super().__init__((n, n), dtype, torch.device(device))

    def _apply(self, x: Tensor) -> Tensor:
        return x.clone()

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def diagonal(self) -> Tensor:
        """Return ones, shape ``(n,)``."""
        return torch.ones(self.shape[0], dtype=self.torch_dtype, device=self.device)

    def frobenius_norm(self) -> Tensor:
        """Return the root of the number of rows."""
        return self.diagonal().norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return 1 and 0."""
        one = torch.ones((), dtype=self.torch_dtype, device=self.device)
        return one, torch.zeros_like(one.abs())

    def power(self, exponent: float) -> IdentityLinearOperator:
        """Return the identity."""
        return self

    def inverse(self, *, damping: float = 0.0) -> DiagonalLinearOperator:
        r"""Return :math:`(1 + \delta)^{-1} I`."""
        return DiagonalLinearOperator(
            damped_inverse(self.diagonal(), damping, "The identity")
        )
