"""Kronecker-factored optimal curvature."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.curvature.summed import as_risk
from torchlinop.kronecker.adding import Structure, accumulate
from torchlinop.kronecker.blocks import MatrixPlan, TiedPlan
from torchlinop.kronecker.ekfac import require_gradients
from torchlinop.kronecker.looks import Look
from torchlinop.kronecker.operator import BlockwiseLinearOperator
from torchlinop.kronecker.passes import KFACBlock, kfac_pass
from torchlinop.kronecker.settings import Settings
from torchlinop.kronecker.tied import gradients_of
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import BlockDiagonalLinearOperator


class KFOCLinearOperator(BlockwiseLinearOperator):
    r"""Nearest Kronecker product of each block of the GGN or Fisher matrix.

    Minimizes :math:`\lVert G_W - B \otimes A \rVert_F` by alternating least squares,

    .. math::
        B = \sum_{n,c} M_{nc} A M_{nc}^\top / \lVert A \rVert_F^2, \qquad
        A = \sum_{n,c} M_{nc}^\top B M_{nc} / \lVert B \rVert_F^2

    with whole gradients :math:`M_{nc}` of single samples, which is a power iteration for
    the largest singular value of the rearranged block. It starts at KFAC and gets nearer in
    every step, each of which is a pass over the data.

    Parameters
    ----------
    model, loss_function, params, data
        As for :class:`~torchlinop.KFACLinearOperator`.
    fisher_type, mc_samples, seed, joint_bias, uncovered
        As there; ``"forward-only"`` has no gradients and is refused.
    rtol
        The passes end when no block's singular value grows by more than this part of it.
    max_passes
        Most passes after the first.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace
    num_passes : int
        Passes over the data, that of KFAC included; 0 for a matrix from a file.

    Raises
    ------
    ValueError, TypeError
        As for :class:`~torchlinop.KFACLinearOperator`.

    References
    ----------
    Schnaus, Lee and Triebel, "Kronecker-factored optimal curvature" (2021), Bayesian Deep
    Learning workshop; Van Loan and Pitsianis, "Approximation with Kronecker products"
    (1993), https://doi.org/10.1007/978-94-015-8196-7_17

    Examples
    --------
    >>> import torch
    >>> from torchlinop import KFOCLinearOperator
    >>> model = torch.nn.Linear(2, 2)
    >>> data = [(torch.rand(4, 2), torch.tensor([0, 1, 0, 0]))]
    >>> KFOCLinearOperator(model, torch.nn.CrossEntropyLoss(), model.parameters(), data)
    <6x6 KFOCLinearOperator of float32 on cpu>
    """

    num_passes = 0

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        *,
        fisher_type: str = "type-2",
        mc_samples: int = 1,
        seed: int = 0,
        joint_bias: bool = True,
        uncovered: str = "error",
        rtol: float = 1e-4,
        max_passes: int = 30,
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        settings = Settings.of(
            risk,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            joint_bias=joint_bias,
            uncovered=uncovered,
        )
        require_gradients(settings, "KFOCLinearOperator")
        if not (rtol >= 0 and max_passes >= 1):
            raise ValueError(
                "Expected rtol >= 0 and max_passes >= 1, got "
                f"rtol={rtol!r}, max_passes={max_passes!r}."
            )
        self._rtol, self._max_passes = rtol, max_passes
        super().__init__(risk, settings)

    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        result = kfac_pass(risk, self.settings)
        sizes: Tensor | None = None
        passes = 1
        for step in range(self._max_passes):
            grown = _half_step(risk, self.settings, result.blocks, of_outputs=step % 2 == 0)
            passes += 1
            over = grown is None or (
                sizes is not None and bool((grown - sizes <= self._rtol * grown).all())
            )
            # the first process decides: others may round differently
            if risk.options.ranks.together(partial(bool, over), "adding up")[0]:
                break
            sizes = grown
        self.num_passes = passes
        return result.operator(risk, [block.operator() for block in result.blocks])


def _half_step(
    risk: EmpiricalRisk, settings: Settings, blocks: list[KFACBlock], *, of_outputs: bool
) -> Tensor | None:
    """Make one factor of each block the best one for the other; return singular values."""
    fixed: dict[int, Tensor] = {}
    for i, block in enumerate(blocks):
        factor = block.inputs if of_outputs else block.outputs
        if factor is not None:
            full = torch.diag_embed(factor) if factor.ndim == 2 else factor
            fixed[i] = full / _norms(full)
    if not fixed:
        return None
    _, sums = accumulate(
        risk, settings, lambda structure: _HalfStep(structure, fixed, of_outputs)
    )
    for i, total in sums.totals.items():
        total = (total + total.mT) / 2
        if of_outputs:
            blocks[i].inputs, blocks[i].outputs = fixed[i], total
        else:
            blocks[i].inputs, blocks[i].outputs = total, fixed[i]
    return torch.cat([_norms(total).reshape(-1) for total in sums.totals.values()])


class _HalfStep:
    """Products of all gradients with the factors that stay, by the block's number."""

    def __init__(
        self, structure: Structure, fixed: dict[int, Tensor], of_outputs: bool
    ) -> None:
        self._fixed, self._of_outputs = fixed, of_outputs
        self._dtype = next(iter(fixed.values())).dtype
        self.totals: dict[int, Tensor] = {}
        for i, factor in fixed.items():
            plan = structure.plans[i]
            if isinstance(plan, TiedPlan):
                groups, size = 1, plan.rows if of_outputs else plan.columns
            else:
                assert isinstance(plan, MatrixPlan)
                groups, size = plan.groups, plan.outputs if of_outputs else plan.inputs
            self.totals[i] = factor.new_zeros(groups, size, size)

    def add(self, look: Look) -> None:
        """Add a batch."""
        weights = look.evaluation.seeds.weights.to(self._dtype)
        with torch.no_grad():
            for gradients in look.evaluation.gradients():
                for i, factor in self._fixed.items():
                    plan = look.blocks[i]
                    sample = gradients_of(plan, look.evaluation, gradients, weights)
                    assert sample is not None
                    self.totals[i] += (
                        sample.output_moment(factor)
                        if self._of_outputs
                        else sample.input_moment(factor)
                    )

    def tensors(self) -> list[Tensor]:
        """Return all sums."""
        return list(self.totals.values())


def _norms(factors: Tensor) -> Tensor:
    """Frobenius norms ``(G, 1, 1)``, 1 for zero matrices."""
    norms = factors.flatten(1).norm(dim=1).view(-1, 1, 1)
    return torch.where(norms > 0, norms, 1.0)
