"""Finding the dimension that counts the samples, by pulling back one sample alone.

A model may put the samples anywhere: first, second (sequences first), merged with tokens.
If only one sample's prediction has a gradient, so have only its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchlinop.kronecker.seeds import Rows
from torchlinop.kronecker.uses import Use


def find_places(
    uses: Sequence[Use],
    rows: Rows,
    known: Sequence[int | None] | None,
    pull_back: Callable[[Tensor], list[Tensor]],
) -> list[int | None]:
    """Return for every use which dimension of its positions counts the samples.

    None where there is no such dimension: all samples share the positions.

    Parameters
    ----------
    uses
        In a forward pass.
    rows
        Where the samples are in a prediction.
    known
        What was found for another batch, for uses of the same kinds.
    pull_back
        Gradients ``(1, *output)`` in the outputs of all uses of a vector that is shaped
        like the prediction.
    """
    samples = rows.samples
    if samples == 1:
        return [None] * len(uses)
    candidates = [_divisible(use, samples) for use in uses]
    if known is not None and len(known) == len(uses):
        pairs = zip(known, candidates, strict=True)
        if all(dim is None or dim in dims for dim, dims in pairs):
            return list(known)
    ambiguous = any(len(dims) > 1 for dims in candidates)
    generator = torch.Generator("cpu").manual_seed(0)
    for n in (samples // 2, 0, samples - 1) if ambiguous else (samples // 2,):
        random = torch.rand(
            rows.shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        gradients = pull_back(rows.of_sample(1 + random.unsqueeze(0), n).squeeze(0))
        for i, use in enumerate(uses):
            moved = use.positions_first(gradients[i])[0]
            candidates[i] = [
                dim for dim in candidates[i] if _only_of(moved, dim, n, samples)
            ]
    return [dims[0] if dims else None for dims in candidates]


def _divisible(use: Use, samples: int) -> list[int]:
    sizes = enumerate(use.positions)
    return [dim for dim, size in sizes if size and size % samples == 0]


def _only_of(gradient: Tensor, dim: int, n: int, samples: int) -> bool:
    """Whether a gradient is zero but for the positions of one sample along ``dim``."""
    each = gradient.shape[dim] // samples
    before = gradient.narrow(dim, 0, n * each)
    after = gradient.narrow(dim, (n + 1) * each, (samples - n - 1) * each)
    return not bool(before.any() | after.any())
