"""Constructors with curvlinops' arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.data.seeds import seeded_pass

#: curvlinops' default seed
_SEED = 2147483647


class _Options(TypedDict):
    progressbar: bool
    check_deterministic: bool
    batch_size: Callable[[Any], int] | None


def _options(
    data: Data,
    progressbar: bool,
    check_deterministic: bool,
    num_data: int | None,
    batch_size_fn: Callable[[Any], int] | None,
) -> _Options:
    """Translate the arguments; compare the number of samples claimed with the data."""
    if num_data is not None:
        count = batch_size_fn or (lambda X: int(X.shape[0]))
        found = sum(count(X) for X, _ in seeded_pass(data, 0))
        if found != num_data:
            raise ValueError(f"num_data={num_data}, but the data holds {found} samples.")
    return {
        "progressbar": progressbar,
        "check_deterministic": check_deterministic,
        "batch_size": batch_size_fn,
    }


class HessianLinearOperator(torchlinop.HessianLinearOperator):
    """:class:`torchlinop.HessianLinearOperator` with curvlinops' arguments."""

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
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(model_func, loss_func, params, data, **options)


class GGNLinearOperator(torchlinop.GGNLinearOperator):
    """:class:`torchlinop.GGNLinearOperator` with curvlinops' arguments."""

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
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(model_func, loss_func, params, data, **options)


class EFLinearOperator(torchlinop.EFLinearOperator):
    """:class:`torchlinop.EFLinearOperator` with curvlinops' arguments."""

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
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(model_func, loss_func, params, data, **options)


class FisherMCLinearOperator(torchlinop.FisherMCLinearOperator):
    """:class:`torchlinop.FisherMCLinearOperator` with curvlinops' arguments.

    The labels drawn for a seed are not those that curvlinops draws.
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
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            seed=seed,
            mc_samples=mc_samples,
            **options,
        )


class JacobianLinearOperator(torchlinop.JacobianLinearOperator):
    """:class:`torchlinop.JacobianLinearOperator` with curvlinops' arguments."""

    def __init__(
        self,
        model_func: Model,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        options = _options(data, progressbar, check_deterministic, num_data, batch_size_fn)
        super().__init__(model_func, params, data, **options)


def TransposedJacobianLinearOperator(*args: Any, **kwargs: Any) -> TorchLinearOperator:
    """Transpose of :class:`JacobianLinearOperator`, from the same arguments."""
    return JacobianLinearOperator(*args, **kwargs).T
