"""Block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlinop._algebra import Power
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Scalar
from torchlinop.structured.base import StructuredLinearOperator, same_place


class Layout(Protocol):
    """Where the entries of a vector belong to."""

    def split(self, x: Tensor) -> list[Tensor]:
        """Return what each block is multiplied with, of shapes ``(n_i, K)``."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`, in fresh memory."""

    def label(self, i: int) -> str:
        """Return a name of a block for errors."""


@dataclass(frozen=True)
class Contiguous:
    """Blocks one after the other."""

    sizes: tuple[int, ...]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return views."""
        return list(x.split(list(self.sizes)))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put blocks one below the other."""
        return torch.cat(list(parts))

    def label(self, i: int) -> str:
        """Return the number of the block."""
        return f"block {i}"


class BlockDiagonalLinearOperator(StructuredLinearOperator):
    """A block-diagonal matrix of square blocks.

    Traces, determinants, norms, powers and inverses are those of the blocks, which have to
    be structured for it. Sums and products of matrices with equal blocks, multiples and
    powers are block diagonal.

    Parameters
    ----------
    blocks
        Square operators or matrices.
    layout
        Which entries of a vector belong to which block; by default one after the other.

    Attributes
    ----------
    blocks : tuple of TorchLinearOperator

    Raises
    ------
    ValueError
        There is no block, or one is not square, or they are on several devices.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import BlockDiagonalLinearOperator, DiagonalLinearOperator
    >>> D = DiagonalLinearOperator(torch.tensor([2.0, 3.0]))
    >>> B = BlockDiagonalLinearOperator([D, torch.ones(1, 1)])
    >>> B @ torch.ones(3)
    tensor([2., 3., 1.])
    """

    def __init__(self, blocks: Sequence[Any], layout: Layout | None = None) -> None:
        self.blocks = tuple(aslinearoperator(block) for block in blocks)
        if not self.blocks:
            raise ValueError("A block-diagonal matrix needs at least one block.")
        dtype, device = self.blocks[0].torch_dtype, self.blocks[0].device
        for block in self.blocks:
            if block.shape[0] != block.shape[1]:
                raise ValueError(f"All blocks have to be square, got {block.shape}.")
            if block.device != device:
                raise ValueError(
                    f"All blocks have to be on one device, got {device} and {block.device}."
                )
            dtype = torch.promote_types(dtype, block.torch_dtype)
        sizes = tuple(block.shape[0] for block in self.blocks)
        self.layout: Layout = Contiguous(sizes) if layout is None else layout
        super().__init__((sum(sizes), sum(sizes)), dtype, device)

    def _apply(self, x: Tensor) -> Tensor:
        parts = zip(self.blocks, self.layout.split(x), strict=True)
        return self.layout.join([b._product(p).to(self.torch_dtype) for b, p in parts])

    def _adjoint(self) -> TorchLinearOperator:
        adjoints = [block._adjoint() for block in self.blocks]
        if all(a is b for a, b in zip(adjoints, self.blocks, strict=True)):
            return self
        return BlockDiagonalLinearOperator(adjoints, self.layout)

    # ------------------------------------------------------------------ functions

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        columns = [b.diagonal().unsqueeze(1) for b in self._structured()]
        return self.layout.join([c.to(self.torch_dtype) for c in columns]).reshape(-1)

    def trace(self) -> Tensor:
        """Return the sum of the blocks' traces."""
        return torch.stack([block.trace() for block in self._structured()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return torch.stack([b.frobenius_norm() for b in self._structured()]).norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        parts = [block.slogdet() for block in self._structured()]
        logabs = torch.stack([p[1].double() for p in parts]).sum()
        return torch.stack([p[0] for p in parts]).prod(), logabs.to(parts[0][1].dtype)

    def power(self, exponent: float) -> BlockDiagonalLinearOperator:
        """Return the matrix of the blocks' powers."""
        return self.map(lambda block: block.power(exponent))

    def inverse(self, *, damping: float = 0.0) -> BlockDiagonalLinearOperator:
        r"""Return the matrix of the blocks' damped inverses."""
        return self.map(lambda block: block.inverse(damping=damping))

    def map(
        self, function: Callable[[StructuredLinearOperator], TorchLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        """Return the block-diagonal matrix of a function of the blocks.

        Raises
        ------
        ValueError
            The function raised one; the error names the block.
        """
        blocks = []
        for i, block in enumerate(self._structured()):
            try:
                blocks.append(function(block))
            except ValueError as error:
                raise ValueError(f"In {self.layout.label(i)}: {error}") from error
        return BlockDiagonalLinearOperator(blocks, self.layout)

    def _structured(self) -> list[StructuredLinearOperator]:
        blocks: list[StructuredLinearOperator] = []
        for i, block in enumerate(self.blocks):
            if not isinstance(block, StructuredLinearOperator):
                raise TypeError(
                    f"{self.layout.label(i)} is a {type(block).__name__}, of which only "
                    "products are known. Structured blocks are DiagonalLinearOperator, "
                    "KroneckerLinearOperator, EighLinearOperator and others: for a small "
                    "symmetric matrix, EighLinearOperator(*torch.linalg.eigh(matrix))."
                )
            blocks.append(block)
        return blocks

    # ------------------------------------------------------------------ the algebra

    def _partner(self, other: TorchLinearOperator) -> BlockDiagonalLinearOperator | None:
        """Return what has blocks in the same places, None for other operators."""
        if isinstance(other, StructuredLinearOperator):
            other = other._fixed()
        if (
            isinstance(other, BlockDiagonalLinearOperator)
            and same_place(self, other)
            and other.layout == self.layout
            and [b.shape for b in other.blocks] == [b.shape for b in self.blocks]
        ):
            return other
        return None

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        partner = self._partner(other)
        if partner is None:
            return super()._plus(other)
        pairs = zip(self.blocks, partner.blocks, strict=True)
        return BlockDiagonalLinearOperator([a + b for a, b in pairs], self.layout)

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        partner = self._partner(other)
        if partner is None:
            return super()._times(other)
        pairs = zip(self.blocks, partner.blocks, strict=True)
        return BlockDiagonalLinearOperator([a @ b for a, b in pairs], self.layout)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        blocks = [block._scaled(alpha) for block in self.blocks]
        return BlockDiagonalLinearOperator(blocks, self.layout)

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        _, exponent = Power(self, p).args
        return BlockDiagonalLinearOperator([b**exponent for b in self.blocks], self.layout)
