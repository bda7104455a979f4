"""What KFAC and EKFAC take."""

from __future__ import annotations

from typing import Any

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.curvature.summed import as_risk
from torchlinop.kronecker.operator import BlockwiseLinearOperator
from torchlinop.kronecker.settings import Settings
from torchlinop.sources import EmpiricalRisk


class KroneckerFactoredLinearOperator(BlockwiseLinearOperator):
    """A block-diagonal approximation with all of the options.

    Not to be made by users, who find them described in
    :class:`~torchlinop.KFACLinearOperator`.
    """

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
        weight_sharing: str = "expand",
        joint_bias: bool = True,
        uncovered: str = "error",
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        settings = Settings.of(
            risk,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            weight_sharing=weight_sharing,
            joint_bias=joint_bias,
            uncovered=uncovered,
        )
        super().__init__(risk, settings)
