"""The identity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator


class IdentityLinearOperator(TorchLinearOperator):
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
        super().__init__((n, n), dtype, torch.device(device))

    def _apply(self, x: Tensor) -> Tensor:
        return x.clone()

    def _adjoint(self) -> TorchLinearOperator:
        return self
