"""KFAC and the GGN's diagonal with curvlinops' arguments.

Not there: ``state_dict``, ``load_state_dict`` and ``from_state_dict``; an operator of this
package is written to a file by ``save(path)`` and read by ``load(path)``.
"""

from __future__ import annotations

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.compat.curvlinops.arguments import SEED, BatchSize, as_risk
from torchlinop.compat.curvlinops.lists import with_lists
from torchlinop.compat.curvlinops.operators import RiskLinearOperator
from torchlinop.kronecker import FisherType
from torchlinop.kronecker import WeightSharing as KFACType
from torchlinop.kronecker.damping import damped_inverse
from torchlinop.kronecker.factored import KroneckerFactoredLinearOperator
from torchlinop.kronecker.operator import BlockwiseLinearOperator

__all__ = [
    "EKFACLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
]


class _KroneckerLinearOperator(RiskLinearOperator, BlockwiseLinearOperator):
    """Their inverse."""

    def inverse(  # type: ignore[override]
        self,
        damping: float = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> TorchLinearOperator:
        """:func:`KFACInverseLinearOperator` of this operator."""
        return KFACInverseLinearOperator(
            self, damping, use_heuristic_damping, min_damping, use_exact_damping
        )


class _FactoredLinearOperator(_KroneckerLinearOperator, KroneckerFactoredLinearOperator):
    """Their arguments."""

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: BatchSize | None = None,
        backend: str = "hooks",
    ) -> None:
        options = progressbar, check_deterministic, num_data, batch_size_fn
        super().__init__(
            as_risk(model_func, loss_func, params, data, *options),
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            weight_sharing=kfac_approx,
            joint_bias=not separate_weight_and_bias,
        )


class KFACLinearOperator(_FactoredLinearOperator, torchlinop.KFACLinearOperator):
    """:class:`torchlinop.KFACLinearOperator` with curvlinops' arguments.

    Number and place of the loss terms of a sample are found in the prediction, and there is
    one way to compute: ``num_per_example_loss_terms`` and ``backend`` are not used.
    """


class EKFACLinearOperator(_FactoredLinearOperator, torchlinop.EKFACLinearOperator):
    """:class:`torchlinop.EKFACLinearOperator` with curvlinops' arguments.

    As for :class:`KFACLinearOperator`.
    """


class KFOCLinearOperator(_KroneckerLinearOperator, torchlinop.KFOCLinearOperator):
    """:class:`torchlinop.KFOCLinearOperator` with curvlinops' arguments.

    Of the GGN, as there, but on any number of batches.
    """

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: BatchSize | None = None,
    ) -> None:
        options = progressbar, check_deterministic, num_data, batch_size_fn
        super().__init__(
            as_risk(model_func, loss_func, params, data, *options),
            fisher_type=FisherType.TYPE2,
            joint_bias=not separate_weight_and_bias,
        )


class GGNDiagonalLinearOperator(RiskLinearOperator, torchlinop.GGNDiagonalLinearOperator):
    """:class:`torchlinop.GGNDiagonalLinearOperator` with curvlinops' arguments.

    Exact, or sampled with ``mc_samples`` of 1 or more.
    """

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        *,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: BatchSize | None = None,
        mc_samples: int = 0,
        seed: int = SEED,
    ) -> None:
        options = progressbar, check_deterministic, num_data, batch_size_fn
        super().__init__(
            as_risk(model_func, loss_func, params, data, *options),
            fisher_type=FisherType.MC if mc_samples else FisherType.TYPE2,
            mc_samples=mc_samples or 1,
            seed=seed,
        )

    def inverse(self, damping: float = 0.0) -> TorchLinearOperator:  # type: ignore[override]
        """Return the inverse of the damped matrix as it is now."""
        return self._like(self.matrix.inverse(damping=damping))


def KFACInverseLinearOperator(
    A: TorchLinearOperator,
    damping: float | tuple[float, float] = 0.0,
    use_heuristic_damping: bool = False,
    min_damping: float = 1e-8,
    use_exact_damping: bool = False,
    cache: bool = True,
    retry_double_precision: bool = True,
) -> TorchLinearOperator:
    """Damped inverse of KFAC, EKFAC or KFOC with curvlinops' arguments.

    Parameters
    ----------
    A
        The operator.
    damping
        For all factors, or one for those of inputs and one for those of gradients.
    use_heuristic_damping, min_damping
        Damping by Martens and Grosse, and its least value.
    use_exact_damping
        Damp the Kronecker product, not the factors. EKFAC is always damped so.
    cache, retry_double_precision
        Not used: both are always so.
    """
    if not isinstance(A, BlockwiseLinearOperator):
        raise ValueError(
            f"A has to be a KFAC, EKFAC or KFOC operator, got {type(A).__name__}."
        )
    if use_heuristic_damping and use_exact_damping:
        raise ValueError("Heuristic and exact damping exclude each other.")
    strategy = "plain"
    if use_heuristic_damping or use_exact_damping:
        strategy = "heuristic" if use_heuristic_damping else "exact"
    if isinstance(damping, tuple):  # ours are in the order of the factors
        damping = (damping[1], damping[0])
    inverse = damped_inverse(A.matrix, damping, strategy, min_damping)
    return with_lists(inverse, A.space.shapes, A.space.shapes)
