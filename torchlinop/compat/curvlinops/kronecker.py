"""KFAC and structured matrices with curvlinops' arguments.

Not there: ``state_dict``, ``load_state_dict`` and ``from_state_dict``; an operator of this
package is written to a file by ``save(path)`` and read by ``load(path)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.compat.curvlinops.operators import _SEED, _options
from torchlinop.kronecker import FisherType
from torchlinop.kronecker import WeightSharing as KFACType
from torchlinop.kronecker.damping import damped_inverse
from torchlinop.kronecker.operator import BlockwiseLinearOperator
from torchlinop.structured import BlockDiagonalLinearOperator as _BlockDiagonal

__all__ = [
    "EKFACLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
]


class KFACLinearOperator(torchlinop.KFACLinearOperator):
    """:class:`torchlinop.KFACLinearOperator` with curvlinops' arguments.

    Number and place of the loss terms of a sample are found in the prediction;
    ``num_per_example_loss_terms`` is not used.
    """

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = _SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            weight_sharing=kfac_approx,
            joint_bias=not separate_weight_and_bias,
            **options,
        )


class EKFACLinearOperator(torchlinop.EKFACLinearOperator):
    """:class:`torchlinop.EKFACLinearOperator` with curvlinops' arguments.

    As for :class:`KFACLinearOperator`.
    """

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = _SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            weight_sharing=kfac_approx,
            joint_bias=not separate_weight_and_bias,
            **options,
        )


class KFOCLinearOperator(torchlinop.KFOCLinearOperator):
    """:class:`torchlinop.KFOCLinearOperator` with curvlinops' arguments.

    As for :class:`KFACLinearOperator`; ``kfac_approx`` is not used, since the nearest
    Kronecker product does not depend on it.
    """

    def __init__(
        self,
        model_func: Model,
        loss_func: Loss,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = _SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            joint_bias=not separate_weight_and_bias,
            **options,
        )


class GGNDiagonalLinearOperator(torchlinop.GGNDiagonalLinearOperator):
    """:class:`torchlinop.GGNDiagonalLinearOperator` with curvlinops' arguments.

    ``mode`` is ``"exact"`` or ``"mc"``.
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
        batch_size_fn: Callable[[Any], int] | None = None,
        mode: str = "exact",
        seed: int = _SEED,
        mc_samples: int = 1,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        if mode not in ("exact", "mc"):
            raise ValueError(f"mode has to be 'exact' or 'mc', got {mode!r}.")
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            fisher_type="mc" if mode == "mc" else "type-2",
            mc_samples=mc_samples,
            seed=seed,
            **options,
        )


class KFACInverseLinearOperator(_BlockDiagonal):
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
        Damp the Kronecker product, not the factors.
    cache, retry_double_precision
        Not used: both are always so.
    """

    def __init__(
        self,
        A: TorchLinearOperator,
        damping: float | tuple[float, float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        cache: bool = True,
        retry_double_precision: bool = True,
    ) -> None:
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
        super().__init__(inverse.blocks, inverse.layout)
