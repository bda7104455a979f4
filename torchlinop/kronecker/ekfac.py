"""Eigenvalue-corrected KFAC."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.kronecker.adding import accumulate, take_first
from torchlinop.kronecker.blocks import BlockPlan, MatrixPlan, TiedPlan
from torchlinop.kronecker.factored import KroneckerFactoredLinearOperator
from torchlinop.kronecker.looks import Look
from torchlinop.kronecker.passes import KFACBlock, kfac_pass
from torchlinop.kronecker.seeds import FisherType
from torchlinop.kronecker.settings import Settings
from torchlinop.kronecker.tied import gradients_of
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    KroneckerLinearOperator,
    StructuredLinearOperator,
)


class EKFACLinearOperator(KroneckerFactoredLinearOperator):
    r"""KFAC with the diagonal of the GGN or Fisher matrix in KFAC's eigenbasis.

    .. math::
        G_W \approx (Q_B \otimes Q_A) \operatorname{diag}(\lambda) (Q_B \otimes Q_A)^\top,
        \qquad \lambda = \sum_{n,c} \big(Q_B^\top M_{nc} Q_A\big)^{\circ 2}

    with whole gradients :math:`M_{nc}` of single samples (sums over the positions at which
    a weight is used). Of all matrices with these eigenvectors it is the nearest one in
    Frobenius norm, so it is never farther from the block than KFAC, and its trace is the
    block's. It needs a second pass over the data.

    Parameters
    ----------
    model, loss_function, params, data, fisher_type, mc_samples, seed, weight_sharing, joint_bias, uncovered
        As for :class:`~torchlinop.KFACLinearOperator`, which makes the eigenbasis;
        ``"forward-only"`` has no gradients and is refused.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace

    Raises
    ------
    ValueError, TypeError
        As for :class:`~torchlinop.KFACLinearOperator`.

    References
    ----------
    George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis" (2018), https://arxiv.org/abs/1806.03884

    Examples
    --------
    >>> import torch
    >>> from torchlinop import EKFACLinearOperator, GGNLinearOperator
    >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 2), torch.nn.Flatten())
    >>> data = [(torch.rand(3, 1, 4), torch.tensor([0, 1, 2]))]
    >>> arguments = model, torch.nn.CrossEntropyLoss(), model.parameters(), data
    >>> E = EKFACLinearOperator(*arguments)
    >>> G = GGNLinearOperator(*arguments[:2], list(model.parameters()), data)
    >>> torch.allclose(E.trace(), G.to_dense().trace())
    True
    """  # noqa: E501

    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        require_gradients(self.settings, "EKFACLinearOperator")
        result = kfac_pass(risk, self.settings)
        bases = _Bases(risk, result.blocks)
        accumulate(risk, self.settings, lambda _: bases)
        return result.operator(risk, [basis.operator() for basis in bases.each])


def require_gradients(settings: Settings, what: str) -> None:
    """Refuse what has no output gradients."""
    if settings.fisher_type is FisherType.FORWARD_ONLY:
        raise ValueError(
            f"{what} is made of gradients of single samples, which "
            "fisher_type='forward-only' does without. Use KFACLinearOperator."
        )


class _Bases:
    """The diagonals of all blocks, in their eigenbases."""

    def __init__(self, risk: EmpiricalRisk, blocks: list[KFACBlock]) -> None:
        self.each = [_Basis(block) for block in blocks]
        self._dtype = risk.space.dtype
        take_first(risk, [v for basis in self.each for v in basis.vectors()])

    def add(self, look: Look) -> None:
        """Add a batch."""
        weights = look.evaluation.seeds.weights.to(self._dtype)
        with torch.no_grad():
            for gradients in look.evaluation.gradients():
                for basis, plan in zip(self.each, look.blocks, strict=True):
                    sample = gradients_of(plan, look.evaluation, gradients, weights)
                    if sample is not None:
                        basis.squares += sample.squares(*basis.of_outputs_and_inputs())

    def tensors(self) -> list[Tensor]:
        """Return all diagonals."""
        return [basis.squares for basis in self.each]


class _Basis:
    """The eigenbasis of a block of KFAC, and the diagonal in it."""

    def __init__(self, block: KFACBlock) -> None:
        self._plan: BlockPlan = block.plan
        operator = block.operator()
        parts = (
            operator.blocks
            if isinstance(operator, BlockDiagonalLinearOperator)
            else [operator]
        )
        self._parts: list[KroneckerLinearOperator] = [
            part for part in parts if isinstance(part, KroneckerLinearOperator)
        ]
        shape = [0]
        if isinstance(block.plan, MatrixPlan):
            shape = [block.plan.groups, block.plan.outputs, block.plan.inputs]
        elif isinstance(block.plan, TiedPlan):
            shape = [1, block.plan.rows, block.plan.columns]
        first = self._parts[0]
        #: sums of squared gradients, ``(G, outputs, inputs)``
        self.squares = torch.zeros(shape, dtype=first.torch_dtype, device=first.device)

    def vectors(self) -> list[Tensor]:
        """Return all eigenvectors."""
        if not isinstance(self._plan, (MatrixPlan, TiedPlan)):  # not needed
            return []
        spectra = [spectrum for part in self._parts for spectrum in part.spectra()]
        return [s.vectors for s in spectra if s.vectors is not None]

    def of_outputs_and_inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """Return both bases, ``(G, d, d)``."""
        return self._basis(of_outputs=True), self._basis(of_outputs=False)

    def _basis(self, *, of_outputs: bool) -> Tensor | None:
        plan = self._plan
        assert isinstance(plan, (MatrixPlan, TiedPlan))
        if not (of_outputs or plan.has_weight):
            return None
        place = int(of_outputs == plan.transposed)
        vectors = [part.spectra()[place].vectors for part in self._parts]
        found = [v for v in vectors if v is not None]
        return torch.stack(found) if found else None

    def operator(self) -> StructuredLinearOperator:
        """Return the block with the corrected eigenvalues."""
        plan = self._plan
        if not isinstance(plan, (MatrixPlan, TiedPlan)):  # exact already
            return self._parts[0]
        groups = []
        for part, squares in zip(self._parts, self.squares, strict=True):
            values = squares.mT if plan.transposed else squares
            groups.append(part.with_eigenvalues(values.reshape(-1)))
        return groups[0] if len(groups) == 1 else BlockDiagonalLinearOperator(groups)
