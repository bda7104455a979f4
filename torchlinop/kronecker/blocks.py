"""Which parameters share a block, and what a batch says about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlinop._space import ParameterSpace
from torchlinop.kronecker.layout import Group
from torchlinop.kronecker.places import Place
from torchlinop.kronecker.uses import EmbeddingUse, MatrixUse, Use, VectorUse


@dataclass(frozen=True)
class BlockPlan:
    """A block by its parameters and the uses that it is made of.

    Attributes
    ----------
    group : Group
        The parameters.
    uses : tuple of int
        Which of the uses of a forward pass, in their order.
    """

    group: Group
    uses: tuple[int, ...]

    @property
    def label(self) -> str:
        """Names of the parameters."""
        return ", ".join(self.group.names)


@dataclass(frozen=True)
class MatrixPlan(BlockPlan):
    """A weight, with or without its bias, or a bias alone.

    Attributes
    ----------
    transposed : bool
        Whether the rows of the block's matrix belong to inputs.
    has_weight, has_bias : bool
        What the inputs consist of: the captured ones, and ones.
    groups : int
        Into how many equal blocks the block falls.
    outputs, inputs : int
        Sizes of the factors of one group.
    indexed : bool
        Whether the inputs are unit vectors, given as indices.
    """

    transposed: bool = False
    has_weight: bool = True
    has_bias: bool = False
    groups: int = 1
    outputs: int = 0
    inputs: int = 0
    indexed: bool = False

    def output_gradients(
        self, gradients: Sequence[Tensor], uses: Sequence[Use], places: Sequence[Place]
    ) -> Tensor:
        """Return ``(K, G, S, T, outputs)`` of gradients in the outputs of all uses."""
        parts = []
        for i in self.uses:
            g = uses[i].output_gradients(gradients[i], places[i])
            if g.shape[1] != self.groups:  # a bias alone has no groups
                g = g.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)
            parts.append(g)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def input_vectors(
        self, uses: Sequence[Use], places: Sequence[Place], samples: slice, like: Tensor
    ) -> Tensor:
        """Return the inputs ``(G, S, T, inputs)`` of some samples, or ``(1, S, T)``."""
        count = samples.stop - samples.start
        parts = []
        for i in self.uses:
            use = uses[i]
            assert isinstance(use, MatrixUse)
            if self.has_weight:
                a = use.inputs(places[i], samples)
                if self.has_bias:
                    a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            else:
                positions = torch.Size(use.positions).numel()
                each = (
                    positions if places[i].axis is None else positions // places[i].samples
                )
                like = use.inputs(places[i], slice(0, 1))
                a = like.new_ones(1, count, each, 1)
            if places[i].axis is None and a.shape[1] != count:  # shared by the samples
                a = a.expand(a.shape[0], count, *a.shape[2:])
            parts.append(a)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True)
class TiedPlan(BlockPlan):
    """A matrix that is used in several ways, each of which makes other factors.

    Attributes
    ----------
    rows, columns : int
        Of the matrix.
    parts : tuple of MatrixPlan
        The uses of each kind: as it is or transposed, of vectors or of indices.
    """

    rows: int = 0
    columns: int = 0
    parts: tuple[MatrixPlan, ...] = ()
    #: rows of the block's matrix are rows of the parameter
    transposed = False
    has_weight = True


@dataclass(frozen=True)
class VectorPlan(BlockPlan):
    """Scale and shift of normalizations, whose block is computed exactly.

    Attributes
    ----------
    has_weight, has_bias : bool
        What there is of them.
    size : int
        Number of entries.
    """

    has_weight: bool = True
    has_bias: bool = False
    size: int = 0

    def sample_gradients(
        self, gradients: Sequence[Tensor], uses: Sequence[Use], places: Sequence[Place]
    ) -> Tensor:
        """Return gradients of single samples, ``(K, S, size)``."""
        total: Tensor | None = None
        for i in self.uses:
            use = uses[i]
            g = use.output_gradients(gradients[i], places[i]).squeeze(1)  # (K, S, T, d)
            parts = []
            if self.has_weight:
                assert isinstance(use, VectorUse)
                parts.append((g * use.factors(places[i])).sum(2))
            if self.has_bias:
                parts.append(g.sum(2))
            own = torch.cat(parts, dim=-1)
            total = own if total is None else total + own
        assert total is not None
        return total

    def input_moment(
        self, uses: Sequence[Use], places: Sequence[Place], weights: Tensor
    ) -> Tensor:
        """Return the block for gradients whose outputs are uncorrelated, ``(size, size)``.

        Weighted sum over the samples of means over the positions.
        """
        total: Tensor | None = None
        for i in self.uses:
            use = uses[i]
            assert isinstance(use, VectorUse)
            x = use.factors(places[i]).to(weights.dtype)  # (S, T, d)
            if len(x) != len(weights):
                x = x.expand(len(weights), *x.shape[1:])
            rows = (x, torch.ones_like(x))
            chosen = [
                row
                for row, has in zip(rows, (self.has_weight, self.has_bias), strict=True)
                if has
            ]
            mean = [[torch.diag(weights @ (a * b).mean(1)) for b in chosen] for a in chosen]
            own = torch.cat([torch.cat(row, dim=1) for row in mean]) / len(self.uses)
            total = own if total is None else total + own
        assert total is not None
        return total


@dataclass
class Plan:
    """All blocks of a model, and what no rule covers.

    Attributes
    ----------
    blocks : list of BlockPlan
    uncovered : dict
        Why a parameter has no block, by its index.
    """

    blocks: list[BlockPlan] = field(default_factory=list)
    uncovered: dict[int, str] = field(default_factory=dict)


def plan_blocks(
    uses: Sequence[Use], unknown: dict[int, str], space: ParameterSpace, *, joint_bias: bool
) -> Plan:
    """Find out which parameters share a block.

    Parameters
    ----------
    uses, unknown
        What was captured in a forward pass.
    space
        The parameters.
    joint_bias
        Whether a weight and its bias share a block.
    """
    plan = Plan()
    for i in range(len(space.names)):
        if i in unknown:
            plan.uncovered[i] = f"is given to {unknown[i]!r}, for which there is no rule"
        elif all(i not in (use.weight, use.bias) for use in uses):
            plan.uncovered[i] = "is not used when the model is evaluated"
        else:
            reason = _contradiction([use for use in uses if i in (use.weight, use.bias)], i)
            if reason is not None:
                plan.uncovered[i] = reason
    pairs = _pairs(uses, plan.uncovered) if joint_bias else {}
    joined = set(pairs.values())
    for i in range(len(space.names)):
        if i in plan.uncovered or i in joined:
            continue
        plan.blocks.append(_block(i, pairs.get(i), uses, space))
    return plan


def _contradiction(uses: Sequence[Use], index: int) -> str | None:
    """Return why the uses of one parameter do not make one block."""
    kinds = {isinstance(use, MatrixUse) for use in uses}
    roles = {use.weight == index for use in uses}
    if len(kinds) > 1 or len(roles) > 1:
        return f"is used in several ways ({_functions(uses)}), which make no block"
    if True in roles and isinstance(uses[0], MatrixUse):
        matrices = [use for use in uses if isinstance(use, MatrixUse)]
        groups = {use.groups for use in matrices}
        if len(groups) > 1 or (len(_kinds(matrices)) > 1 and groups != {1}):
            return (
                f"is used in several ways ({_functions(uses)}), which make no single block"
            )
    return None


def _kinds(uses: Iterable[MatrixUse]) -> list[tuple[bool, bool]]:
    """Return in which ways a matrix is used: whether transposed, whether by indices."""
    kinds = ((use.transposed, isinstance(use, EmbeddingUse)) for use in uses)
    return list(dict.fromkeys(kinds))


def _functions(uses: Iterable[Use]) -> str:
    return ", ".join(sorted({use.function for use in uses}))


def _pairs(uses: Sequence[Use], uncovered: dict[int, str]) -> dict[int, int]:
    """Biases by their weights, where each goes with the other only."""
    partners: dict[int, set[int | None]] = {}
    for use in uses:
        if use.weight is not None:
            partners.setdefault(use.weight, set()).add(use.bias)
        if use.bias is not None:
            partners.setdefault(use.bias, set()).add(use.weight)
    pairs = {}
    for use in uses:
        weight, bias = use.weight, use.bias
        if weight is None or bias is None or weight in uncovered or bias in uncovered:
            continue
        if partners[weight] == {bias} and partners[bias] == {weight}:
            pairs[weight] = bias
    return pairs


def _block(
    index: int, bias: int | None, uses: Sequence[Use], space: ParameterSpace
) -> BlockPlan:
    own = [(i, use) for i, use in enumerate(uses) if index in (use.weight, use.bias)]
    numbers, first = tuple(i for i, _ in own), own[0][1]
    indices = (index,) if bias is None else (index, bias)
    names = tuple(space.names[i] for i in indices)
    is_weight = first.weight == index
    shape = space.shapes[index]
    if isinstance(first, VectorUse):
        size = sum(space.sizes[i] for i in indices)
        return VectorPlan(
            Group(names, indices),
            numbers,
            has_weight=is_weight,
            has_bias=not is_weight or bias is not None,
            size=size,
        )
    assert isinstance(first, MatrixUse)
    if not is_weight:
        return MatrixPlan(
            Group(names, indices),
            numbers,
            has_weight=False,
            has_bias=True,
            outputs=shape.numel(),
            inputs=1,
        )
    matrices = [(i, use) for i, use in own if isinstance(use, MatrixUse)]
    parts = []
    for kind in _kinds(use for _, use in matrices):
        chosen = [(i, use) for i, use in matrices if _kinds([use]) == [kind]]
        parts.append(_matrix_plan(names, indices, chosen, shape))
    if len(parts) == 1:
        return parts[0]
    rows, columns = shape[0], shape[1:].numel()
    return TiedPlan(Group(names, indices, rows), numbers, rows, columns, tuple(parts))


def _matrix_plan(
    names: tuple[str, ...],
    indices: tuple[int, ...],
    uses: Sequence[tuple[int, MatrixUse]],
    shape: torch.Size,
) -> MatrixPlan:
    """Describe uses of one kind, given with their numbers, of a weight of this shape."""
    first, has_bias = uses[0][1], len(indices) > 1
    rows, columns = shape[0], shape[1:].numel()
    outputs, inputs = (columns, rows) if first.transposed else (rows, columns)
    return MatrixPlan(
        Group(names, indices, None if first.transposed else rows),
        tuple(i for i, _ in uses),
        transposed=first.transposed,
        has_bias=has_bias,
        groups=first.groups,
        outputs=outputs // first.groups,
        inputs=inputs + has_bias,
        indexed=isinstance(first, EmbeddingUse),
    )
