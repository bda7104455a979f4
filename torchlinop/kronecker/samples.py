"""Finding the dimension that counts the samples, by pulling back one sample alone.

A model may put the samples anywhere: first, second (sequences first), merged with tokens.
If only one sample's prediction has a gradient, so have only its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchlinop.kronecker.places import Axis, Place
from torchlinop.kronecker.seeds import Rows
from torchlinop.kronecker.uses import Use


def find_axes(
    uses: Sequence[Use],
    rows: Rows,
    known: Sequence[Axis | None] | None,
    pull_back: Callable[[int, torch.Generator], list[Tensor]],
) -> list[Axis | None]:
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
        Gradients ``(1, *output)`` in the outputs of all uses of random numbers in the
        prediction of one sample.
    """
    samples = rows.samples
    if samples == 1:
        return [None] * len(uses)
    candidates = [_candidates(use, samples) for use in uses]
    if known is not None and len(known) == len(uses):
        pairs = list(zip(known, candidates, strict=True))
        if all(axis is None or any(axis.dim == a.dim for a in own) for axis, own in pairs):
            return list(known)
    generator = torch.Generator("cpu").manual_seed(0)
    for n in (samples // 2, 0, samples - 1):
        gradients = pull_back(n, generator)
        for i, use in enumerate(uses):
            moved = use.positions_first(gradients[i])[0]
            candidates[i] = [
                axis
                for axis in candidates[i]
                if Place(len(use.positions), axis, samples).only_of(moved, n)
            ]
        if all(len(own) <= 1 for own in candidates):
            break
    return [own[0] if own else None for own in candidates]


def _candidates(use: Use, samples: int) -> list[Axis]:
    axes = []
    for dim, size in enumerate(use.positions):
        if size and size % samples == 0:
            axes.append(Axis(dim, inner=False))
            if size > samples:
                axes.append(Axis(dim, inner=True))
    return axes
