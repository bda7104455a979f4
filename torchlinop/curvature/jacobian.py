"""The Jacobian of a model's predictions, or of any torch function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop._kept import KeptLinearizations
from torchlinop._operator import TorchLinearOperator
from torchlinop._space import aligned
from torchlinop._typing import Data, Model, Parameters
from torchlinop.autodiff.recording import recording
from torchlinop.autodiff.replay import Replayed
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.linearized_model import LinearizedModel
from torchlinop.data import Batch
from torchlinop.sources import (
    EmpiricalRisk,
    ModelOnData,
    Options,
    Source,
    TorchFunction,
)


class JacobianLinearOperator(TorchLinearOperator):
    r"""Jacobian of all predictions with respect to the parameters.

    Rows are the entries of ``model(X)`` in row-major order, batch after batch; columns
    are parameters. The transpose, ``J.T``, shares the linearizations.

    Parameters
    ----------
    model, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes. The targets in ``data``
        are not used; the order of the data is that of the rows.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`, ``reduction``
        excepted.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import JacobianLinearOperator
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> J = JacobianLinearOperator(model, model.parameters(), [(X, None)])
    >>> J.to_dense()
    tensor([[1., 2.],
            [3., 4.]])
    """

    def __init__(
        self,
        model: Model | ModelOnData | EmpiricalRisk | TorchFunction,
        params: Parameters | None = None,
        data: Data | None = None,
        **options: Any,
    ) -> None:
        source: Source
        if isinstance(model, (ModelOnData, EmpiricalRisk, TorchFunction)):
            source = model
        elif params is None or data is None:
            raise TypeError("Missing arguments: pass (model, params, data).")
        else:
            source = ModelOnData(model, params, data, Options.of(options))
        if source.changed():  # it is new, or has changed since it was made
            source.survey()
        source.batches.require_order()
        self.space = source.space
        shape = (sum(_output_sizes(source)), self.space.dim)
        super().__init__(shape, self.space.dtype, self.space.device)
        self._maps: KeptLinearizations[_JacobianMap] = KeptLinearizations(
            source, partial(_jacobian_map, source, DerivativeCheck(source)), ordered=True
        )

    @staticmethod
    def from_function(f: Callable[[Any], Tensor], x: Any) -> JacobianLinearOperator:
        """Jacobian of any torch function at ``x``.

        Parameters
        ----------
        f
            Function of ``x`` that returns a tensor.
        x
            A tensor, or a dict or list of tensors. The operator follows changes of its
            values; after changes of other things that ``f`` uses, call :meth:`refresh`.

        Examples
        --------
        >>> import torch
        >>> from torchlinop import JacobianLinearOperator
        >>> x = torch.tensor([1.0, 2.0])
        >>> J = JacobianLinearOperator.from_function(lambda x: x.prod() * x, x)
        >>> J.to_dense()
        tensor([[4., 1.],
                [4., 4.]])
        """
        return JacobianLinearOperator(TorchFunction(f, x))

    def _apply(self, x: Tensor) -> Tensor:
        rows = x.T.contiguous()

        def compute() -> Tensor:
            with self._maps.current() as maps:
                blocks = [self._maps.block(m.forward, rows, m) for m in maps]
            self._check_outputs(sum(block.shape[1] for block in blocks))
            return torch.cat(blocks, dim=1) if blocks[1:] else blocks[0]

        return self._maps.retrying(compute).T

    def _apply_transpose(self, x: Tensor) -> Tensor:
        def compute() -> Tensor:
            total = x.new_zeros(x.shape[1], self.space.dim)
            start = 0
            with self._maps.current() as maps:
                for linear_map in maps:
                    stop = start + linear_map.outputs
                    self._check_outputs(max(stop, self.shape[0]))
                    rows = x.T[:, start:stop].contiguous()
                    total.add_(self._maps.block(linear_map.backward, rows, linear_map))
                    start = stop
            self._check_outputs(start)
            return total

        return self._maps.retrying(compute).T

    def _check_outputs(self, count: int) -> None:
        if count != self.shape[0]:
            raise RuntimeError(
                f"The model now gives {count} outputs on the data; when the Jacobian was "
                f"built it gave {self.shape[0]}. Build it again."
            )

    def _adjoint(self) -> TorchLinearOperator:
        return _TransposedJacobian(self)

    def refresh(self) -> None:
        """Forget everything that was kept, after changes that could not be noticed."""
        self._maps.refresh()


class _TransposedJacobian(TorchLinearOperator):
    """``J.T`` on the linearizations of ``J``."""

    def __init__(self, jacobian: JacobianLinearOperator) -> None:
        shape = jacobian.shape[::-1]
        super().__init__(shape, jacobian.torch_dtype, jacobian.device)
        self._jacobian = jacobian

    def _apply(self, x: Tensor) -> Tensor:
        return self._jacobian._apply_transpose(x)

    def _adjoint(self) -> TorchLinearOperator:
        return self._jacobian


def _output_sizes(source: Source) -> list[int]:
    """Evaluate the source on every batch for the number of its outputs."""
    sizes = []
    for batch in source.batches:
        leaves = [leaf.detach() for leaf in source.leaves()]
        with recording(source.space.device, rules=False):
            sizes.append(source.predict(leaves, batch).numel())
    return sizes


def _jacobian_map(source: Source, check: DerivativeCheck, batch: Batch) -> _JacobianMap:
    return _JacobianMap(LinearizedModel(source, batch, check))


class _JacobianMap:
    """One batch's Jacobian and its transpose as functions of rows."""

    def __init__(self, model: LinearizedModel) -> None:
        self._model = model
        self.nbytes = model.nbytes
        self.outputs = model.output.numel()
        self._replayed = Replayed(), Replayed()

    def forward(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """``J v`` for a row, or for rows."""
        return self._jvp(v, batched=True) if batched else self._replayed[0](self._jvp, v)

    def backward(self, u: Tensor, *, batched: bool = False) -> Tensor:
        """``J^T u`` for a row, or for rows."""
        return self._vjp(u, batched=True) if batched else self._replayed[1](self._vjp, u)

    def _jvp(self, v: Tensor, *, batched: bool = False) -> Tensor:
        product = self._model.jvp(v, batched=batched)
        # a fresh tensor in the exchanged dtype, never the graph's own
        product = product.to(v.dtype, copy=True)
        return product.reshape(v.shape[0], -1) if batched else product.reshape(-1)

    def _vjp(self, u: Tensor, *, batched: bool = False) -> Tensor:
        output = self._model.output
        u = u.to(output.dtype)
        u = u.reshape((u.shape[0], *output.shape) if batched else output.shape)
        if output.shape[-1:] == (2,):
            u = aligned(u)
        return self._model.vjp(u, batched=batched)
