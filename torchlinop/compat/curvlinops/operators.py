"""Curvature matrices with curvlinops' arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.compat.curvlinops.arguments import (
    SEED,
    BatchSize,
    as_options,
    as_risk,
    located,
)
from torchlinop.compat.curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from torchlinop.compat.curvlinops.lists import ListLinearOperator, Shapes


class RiskLinearOperator(ListLinearOperator):
    """A matrix of an empirical risk: a list has one tensor for each parameter."""

    space: ParameterSpace
    #: None if the matrix was read from a file
    _risk: torchlinop.EmpiricalRisk | None

    def row_shapes(self) -> Shapes:
        """Return the shapes of the parameters."""
        return self.space.shapes

    def column_shapes(self) -> Shapes:
        """Return the shapes of the parameters."""
        return self.space.shapes

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Return the gradient, one tensor for each parameter, and the loss on all data."""
        if self._risk is None:
            raise ValueError("The matrix was read from a file: its loss is not known.")
        return torchlinop.gradient_and_loss(self._risk)


class HessianLinearOperator(RiskLinearOperator, torchlinop.HessianLinearOperator):
    """:class:`torchlinop.HessianLinearOperator` with curvlinops' arguments.

    ``block_sizes`` are numbers of parameters: their Hessians, one after the other, are the
    blocks of a block-diagonal matrix.
    """

    def __new__(cls, *args: Any, block_sizes: Any = None, **kwargs: Any) -> Any:
        """Return a block-diagonal matrix where blocks are asked for."""
        if block_sizes is not None:
            return _hessian_blocks(block_sizes, *args, **kwargs)
        return super().__new__(cls)

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
        block_sizes: None = None,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: BatchSize | None = None,
    ) -> None:
        options = progressbar, check_deterministic, num_data, batch_size_fn
        self._risk = as_risk(model_func, loss_func, params, data, *options)
        super().__init__(self._risk)


class GGNLinearOperator(RiskLinearOperator, torchlinop.GGNLinearOperator):
    """:class:`torchlinop.GGNLinearOperator` with curvlinops' arguments.

    With ``mc_samples`` of 1 or more a :class:`FisherMCLinearOperator` of this ``seed``.
    """

    def __new__(
        cls, *args: Any, mc_samples: int = 0, seed: int = SEED, **kwargs: Any
    ) -> Any:
        """Return a sampled matrix where samples are asked for."""
        if mc_samples:
            sampled: Any = FisherMCLinearOperator
            _require_no_blocks(kwargs.pop("block_sizes", None))
            if len(args) > 6:  # the seed's place there
                kwargs["num_data"], args = args[6], args[:6]
            kwargs.pop("num_per_example_loss_terms", None)
            return sampled(*args, mc_samples=mc_samples, seed=seed, **kwargs)
        return super().__new__(cls)

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
        block_sizes: None = None,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: BatchSize | None = None,
        mc_samples: int = 0,
        seed: int = SEED,
    ) -> None:
        _require_no_blocks(block_sizes)
        options = progressbar, check_deterministic, num_data, batch_size_fn
        self._risk = as_risk(model_func, loss_func, params, data, *options)
        super().__init__(self._risk)


class EFLinearOperator(RiskLinearOperator, torchlinop.EFLinearOperator):
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
        *,
        block_sizes: None = None,
        num_per_example_loss_terms: int | None = None,
        batch_size_fn: BatchSize | None = None,
    ) -> None:
        _require_no_blocks(block_sizes)
        options = progressbar, check_deterministic, num_data, batch_size_fn
        self._risk = as_risk(model_func, loss_func, params, data, *options)
        super().__init__(self._risk)


class FisherMCLinearOperator(RiskLinearOperator, torchlinop.FisherMCLinearOperator):
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
        seed: int = SEED,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: BatchSize | None = None,
    ) -> None:
        options = progressbar, check_deterministic, num_data, batch_size_fn
        self._risk = as_risk(model_func, loss_func, params, data, *options)
        super().__init__(self._risk, seed=seed, mc_samples=mc_samples)


class JacobianLinearOperator(ListLinearOperator, torchlinop.JacobianLinearOperator):
    """:class:`torchlinop.JacobianLinearOperator` with curvlinops' arguments.

    A list of its rows is one tensor of all predictions, shape ``(N, ...)``.
    """

    def __init__(
        self,
        model_func: Model,
        params: Parameters,
        data: Data,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: BatchSize | None = None,
    ) -> None:
        options = as_options(
            data, progressbar, check_deterministic, num_data, batch_size_fn
        )
        super().__init__(located(model_func, params), params, data, **options)

    def row_shapes(self) -> Shapes:
        """Return the shape of the predictions for all data."""
        sample = self.output_shapes[0][1:]
        return [(self.shape[0] // math.prod(sample), *sample)]

    def column_shapes(self) -> Shapes:
        """Return the shapes of the parameters."""
        return self.space.shapes


def TransposedJacobianLinearOperator(*args: Any, **kwargs: Any) -> TorchLinearOperator:
    """Transpose of :class:`JacobianLinearOperator`, from the same arguments."""
    return JacobianLinearOperator(*args, **kwargs).T


def _hessian_blocks(
    sizes: Any,
    model_func: Model,
    loss_func: Loss,
    params: Parameters,
    data: Data,
    *args: Any,
    **kwargs: Any,
) -> BlockDiagonalLinearOperator:
    """Return the Hessians of successive parameters as blocks."""
    params = params if isinstance(params, Mapping) else list(params)
    model_func = located(model_func, params)  # with all of them, not block by block
    listed = list(params.items() if isinstance(params, Mapping) else params)
    if any(size < 1 for size in sizes) or sum(sizes) != len(listed):
        raise ValueError(
            f"block_sizes has to hold positive numbers with the sum {len(listed)}, the "
            f"number of parameters, got {sizes}."
        )
    kind: Any = dict if isinstance(params, Mapping) else list
    parts = [kind(listed[a:b]) for a, b in pairwise(accumulate(sizes, initial=0))]
    return BlockDiagonalLinearOperator(
        [
            HessianLinearOperator(model_func, loss_func, p, data, *args, **kwargs)
            for p in parts
        ]
    )


def _require_no_blocks(block_sizes: None) -> None:
    if block_sizes is not None:
        raise ValueError("Only the Hessian has block_sizes; here they have to be None.")
