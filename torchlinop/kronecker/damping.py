"""Inverses of damped Kronecker products, by three strategies."""

from __future__ import annotations

import math

import torch

from torchlinop._operator import TorchLinearOperator
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    KroneckerLinearOperator,
    Spectrum,
    StructuredLinearOperator,
)

STRATEGIES = ("exact", "plain", "heuristic")


def damped_inverse(
    matrix: BlockDiagonalLinearOperator,
    damping: float | tuple[float, float],
    strategy: str,
    min_damping: float = 0.0,
) -> BlockDiagonalLinearOperator:
    """Invert block by block.

    Parameters
    ----------
    matrix
        Its blocks are structured.
    damping
        At least zero; with ``"plain"`` also one for each of two factors, of which the
        first is that of blocks with one factor.
    strategy
        One of ``STRATEGIES``.
    min_damping
        For ``"heuristic"``, the least damping of a factor.
    """
    if strategy not in STRATEGIES:
        possible = ", ".join(map(repr, STRATEGIES))
        raise ValueError(f"strategy has to be one of {possible}, got {strategy!r}.")
    both = damping if isinstance(damping, tuple) else (damping, damping)
    if len(both) != 2 or (isinstance(damping, tuple) and strategy != "plain"):
        raise ValueError(
            f"Expected one damping, or two with strategy='plain', got {damping!r} with "
            f"strategy={strategy!r}."
        )
    if not all(math.isfinite(d) and d >= 0 for d in both):
        raise ValueError(f"damping has to be a number >= 0, got {damping!r}.")

    def inverse(block: StructuredLinearOperator) -> TorchLinearOperator:
        if isinstance(block, BlockDiagonalLinearOperator):
            return block.map(inverse)
        is_product = isinstance(block, KroneckerLinearOperator) and len(block.factors) == 2
        if strategy == "exact" or not is_product:
            return block.inverse(damping=both[0])
        assert isinstance(block, KroneckerLinearOperator)
        dampings = both if strategy == "plain" else _balanced(block, both[0], min_damping)
        spectra = [
            _inverse(spectrum, own, i)
            for i, (spectrum, own) in enumerate(zip(block.spectra(), dampings, strict=True))
        ]
        return KroneckerLinearOperator.of_spectra(spectra)

    return matrix.map(inverse)


def _balanced(
    block: KroneckerLinearOperator, damping: float, min_damping: float
) -> tuple[float, float]:
    """Return dampings whose product is the damping, in proportion to mean eigenvalues."""
    means = [spectrum.values.double().mean().item() for spectrum in block.spectra()]
    ratio = 1.0 if min(means) <= 0 else math.sqrt(means[0] / means[1])
    root = math.sqrt(damping)
    return max(ratio * root, min_damping), max(root / ratio, min_damping)


def _inverse(spectrum: Spectrum, damping: float, i: int) -> Spectrum:
    damped = spectrum.values + damping
    if bool((damped <= 0).any()):
        raise ValueError(
            f"Factor {i} with damping {damping:.3e} is singular: its smallest eigenvalue "
            f"is {spectrum.smallest:.3e} (the largest {spectrum.values.max().item():.3e}). "
            "Pass a larger damping."
        )
    return spectrum.with_values(torch.reciprocal(damped))
