"""One batch: the model's uses of parameters, and output gradients at each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.interruptible import in_force
from torchlinop.autodiff.recording import recording
from torchlinop.data import Batch
from torchlinop.kronecker.capture import Capture
from torchlinop.kronecker.places import Axis, Place
from torchlinop.kronecker.samples import find_axes
from torchlinop.kronecker.seeds import Seeds, random_seed, rows_of
from torchlinop.sources import EmpiricalRisk

#: a gradient keeps about this many times what the outputs take
_INTERMEDIATE = 3


class Evaluation:
    """A forward pass on one batch.

    Parameters
    ----------
    risk
        The model, its parameters, its loss.
    batch
        On the device.
    seeds
        Makes what is pulled back.
    state
        What earlier batches have learned about how many vectors fit.
    known
        The ``axes`` of another batch.

    Attributes
    ----------
    uses : list of Use
    unknown : dict
        Functions without a rule, by the index of the parameter that they were given.
    places : list of Place
        Where the samples are in each use.
    axes : list of Axis, or None
        The dimensions that count them; None if nothing is known, since a single sample
        may be anywhere.
    seeds : Seeds
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        batch: Batch,
        seeds: Callable[[Tensor, Batch], Seeds],
        state: Experience,
        known: Sequence[Axis | None] | None,
    ) -> None:
        self._risk, self._batch, self._state = risk, batch, state
        with recording(risk.space.device, rules=False, draws=risk.draws(batch)):
            self._leaves = risk.leaves()
            capture = Capture(self._leaves)
            with in_force(capture):
                self._prediction = risk.predict(self._leaves, batch)
        self.uses, self.unknown = capture.uses, capture.unknown
        self._edges = [use.edge for use in self.uses]
        self._rows = rows_of(risk, self._prediction, batch)
        axes = find_axes(self.uses, self._rows, known, self._probe)
        samples = self._rows.samples
        self.places = [
            Place(len(use.positions), axis, samples)
            for use, axis in zip(self.uses, axes, strict=True)
        ]
        self.axes = known if samples == 1 else axes
        self.seeds: Seeds = seeds(self._prediction, batch)

    def _probe(self, n: int, generator: torch.Generator) -> list[Tensor]:
        like = self._prediction.detach()
        seed = random_seed(self._rows, n, like, generator)
        return self._pull_back(seed, self._edges)

    def gradients(self) -> Iterator[list[Tensor]]:
        """Yield gradients in the outputs of all uses, a few seeds at a time.

        Of shapes ``(K, *output)``; where the samples share the positions ``(K S,
        *output)``, with the gradients of each sample alone.
        """
        shared = [place.axis is None and place.samples > 1 for place in self.places]
        own = [edge for i, edge in enumerate(self._edges) if not shared[i]]
        others = [edge for i, edge in enumerate(self._edges) if shared[i]]
        done = 0
        while done < self.seeds.count:
            stop = min(done + self._block_size(), self.seeds.count)
            seeds = self.seeds.make(done, stop)
            found = iter(self._pull_back(seeds, own))
            alone = iter(self._one_by_one(seeds, others))
            yield [next(alone if is_shared else found) for is_shared in shared]
            done = stop

    def parameter_gradients(self, indices: Sequence[int]) -> Iterator[list[Tensor]]:
        """Yield gradients of single samples in parameters, ``(K, *parameter)``.

        For parameters that no rule covers: one sample at a time.
        """
        chosen = [self._leaves[i] for i in indices]
        for n in range(self.seeds.rows.samples):
            for i in range(self.seeds.count):
                seed = self.seeds.rows.of_sample(self.seeds.make(i, i + 1), n)
                yield self._pull_back(seed, chosen)

    def _one_by_one(self, seeds: Tensor, edges: Sequence[Any]) -> list[Tensor]:
        if not edges:
            return []
        rows = self.seeds.rows
        parts = [
            self._pull_back(rows.of_sample(seeds, n), edges) for n in range(rows.samples)
        ]
        # (K, S, *output), sample after sample for each seed
        return [torch.stack(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True)]

    def _block_size(self) -> int:
        size = sum(use.shape.numel() for use in self.uses) + self._prediction.numel()
        nbytes = _INTERMEDIATE * size * self._prediction.element_size()
        return self._state.block_size(nbytes, self._prediction.device)

    def _pull_back(self, seeds: Tensor, inputs: Sequence[Any]) -> list[Tensor]:
        """Return products of the seeds with the transposed Jacobian."""
        if not inputs:
            return []
        if len(seeds) > 1 and self._state.limit != 1:
            try:
                with warnings.catch_warnings():
                    # torch falls back to a loop for operations without a batching rule
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return self._grad(seeds, inputs, batched=True)
            except (RuntimeError, NotImplementedError) as error:
                full = isinstance(error, torch.OutOfMemoryError)
                self._state.limit = max(1, len(seeds) // 2) if full else 1
        half = max(1, len(seeds) // 2)
        if self._state.limit != 1 and len(seeds) > 1:
            blocks = [self._pull_back(part, inputs) for part in seeds.split(half)]
        else:
            blocks = [
                [g.unsqueeze(0) for g in self._grad(seed, inputs, batched=False)]
                for seed in seeds
            ]
        if len(blocks) == 1:
            return blocks[0]
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def _grad(self, seeds: Tensor, inputs: Sequence[Any], *, batched: bool) -> list[Tensor]:
        if not self._prediction.requires_grad:
            gradients: Sequence[Tensor | None] = [None] * len(inputs)
        else:
            try:
                gradients = torch.autograd.grad(
                    self._prediction,
                    inputs,
                    seeds,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            except (RuntimeError, NotImplementedError) as error:
                if batched:
                    raise
                raise self._risk.explained(error, self._batch, order=1) from error
        lead = seeds.shape[:1] if batched else ()
        return [
            self._prediction.new_zeros((*lead, *self._shape(i))) if g is None else g
            for g, i in zip(gradients, inputs, strict=True)
        ]

    def _shape(self, edge: Any) -> torch.Size:
        if isinstance(edge, Tensor):
            return edge.shape
        return next(use.shape for use in self.uses if use.edge is edge)
