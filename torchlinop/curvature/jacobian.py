"""The Jacobian of a model's predictions, or of any torch function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop._kept import KeptLinearizations
from torchlinop._operator import TorchLinearOperator
from torchlinop._space import aligned
from torchlinop._typing import Data, Model, Parameters
from torchlinop.autodiff.columns import LinearRows, PassingRows
from torchlinop.autodiff.recording import recording
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.linearized_model import LinearizedModel
from torchlinop.curvature.single_use import SingleUse
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
    are parameters. The transpose, ``J.T``, shares the linearizations. In a process group
    the rows are those of rank 0's data, then those of rank 1's, and so on; each process
    computes its own, and ``J @ v`` has all of them on every process.

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
    output_shapes : tuple of torch.Size
        Shapes of the predictions, batch after batch.

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
            chosen = Options.of(options)
            source = chosen.ranks.on_each(
                lambda: ModelOnData(model, params, data, chosen),
                f"building a JacobianLinearOperator of {type(model).__name__}",
            )
        ranks = source.options.ranks
        doing = "building a JacobianLinearOperator"
        if any(ranks.together(source.changed, doing)):  # it may be new
            source.survey()
        self.space = source.space
        told = ranks.together(lambda: _output_shapes(source), doing)
        shapes = told[ranks.rank]
        self.output_shapes = tuple(shapes)
        counts = [sum(map(math.prod, others)) for others in told]
        start = sum(counts[: ranks.rank])
        #: those of this process's data
        self._rows = slice(start, start + counts[ranks.rank])
        shape = (sum(counts), self.space.dim)
        super().__init__(shape, self.space.dtype, self.space.device)
        self._maps: KeptLinearizations[_JacobianMap] = KeptLinearizations(
            source, _BatchJacobian(source, shapes), ordered=True
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
        def share() -> Tensor:
            out = x.new_empty(self.shape[0], x.shape[1])
            out[: self._rows.start].zero_()  # the rows of other processes
            out[self._rows.stop :].zero_()
            for linear_map, here in self._places():
                linear_map.forward.apply(x, out[here], self._maps.experience)
            return out

        return self._added(share, x, self.shape[0], "a Jacobian")

    def _apply_transpose(self, x: Tensor) -> Tensor:
        def share() -> Tensor:
            out = x.new_zeros(self.shape[1], x.shape[1])
            for linear_map, here in self._places():
                linear_map.backward.apply(x[here], out, self._maps.experience, add=True)
            return out

        return self._added(share, x, self.shape[1], "a transposed Jacobian")

    def _added(
        self, share: Callable[[], Tensor], x: Tensor, size: int, what: str
    ) -> Tensor:
        shape = (size, x.shape[1])

        def total() -> Tensor:
            return self._maps.ranks.sum(share, x, shape, f"multiplying with {what}")

        return self._maps.retrying(total)

    def _places(self) -> Iterator[tuple[_JacobianMap, slice]]:
        """Yield each batch's map with its rows."""
        start, end = self._rows.start, self._rows.stop
        with self._maps.current() as maps:
            for linear_map in maps:
                stop = start + linear_map.outputs
                self._require_outputs(max(stop, end))
                yield linear_map, slice(start, stop)
                start = stop
        self._require_outputs(start)

    def _require_outputs(self, end: int) -> None:
        if end != self._rows.stop:
            raise RuntimeError(
                f"The model now gives {end - self._rows.start} outputs on the data; when "
                f"the Jacobian was built it gave {self._rows.stop - self._rows.start}. "
                "Build it again."
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


def _output_shapes(source: Source) -> list[torch.Size]:
    """Evaluate the source on every batch for the shape of its output."""
    source.batches.require_order()
    shapes = []
    for batch in source.batches:
        leaves = [leaf.detach() for leaf in source.leaves()]
        with recording(source.space.device, rules=False):
            shapes.append(source.predict(leaves, batch).shape)
    return shapes


class _BatchJacobian:
    """Linearizes a source on a batch."""

    def __init__(self, source: Source, shapes: list[torch.Size]) -> None:
        self._source = source
        self._shapes = shapes
        self._check = DerivativeCheck(source)
        self._single_use = SingleUse(source, self._check)

    def linearize(self, batch: Batch) -> _JacobianMap:
        """Keep the graphs of the batch's prediction."""
        model, _ = LinearizedModel.of(self._source, batch, self._check)
        sizes = {"nbytes": model.nbytes, "nodes": model.nodes}
        return _JacobianMap(
            math.prod(model.shape),
            LinearRows(partial(_jvp, model), **sizes),
            LinearRows(partial(_vjp, model), **sizes),
        )

    def passing(self, batch: Batch) -> _JacobianMap:
        """Apply the batch's Jacobian with nothing kept."""
        return _JacobianMap(
            math.prod(self._shapes[batch.position]),
            PassingRows(
                partial(self._jvp_once, batch), lambda: self.linearize(batch).forward
            ),
            PassingRows(
                partial(self._vjp_once, batch), lambda: self.linearize(batch).backward
            ),
        )

    def _jvp_once(self, batch: Batch, v: Tensor) -> Tensor:
        return self._single_use.jvp(batch, v).reshape(-1).to(v.dtype)

    def _vjp_once(self, batch: Batch, u: Tensor) -> Tensor:
        shape = self._shapes[batch.position]
        return self._single_use.vjp(
            batch, u.to(self._source.space.parameter_dtype).view(shape)
        )


class _JacobianMap:
    """One batch's Jacobian, ``J v``, and its transpose, ``J^T u``, as functions of rows."""

    def __init__(
        self,
        outputs: int,
        forward: LinearRows | PassingRows,
        backward: LinearRows | PassingRows,
    ) -> None:
        self.outputs = outputs
        self.forward = forward
        self.backward = backward

    @property
    def nbytes(self) -> int:
        """Bytes that are kept alive: both directions share the linearization."""
        return self.forward.nbytes + self.backward.replay_bytes

    @property
    def calls(self) -> int:
        """Number of single products in the direction that has seen more."""
        return max(self.forward.calls, self.backward.calls)


def _jvp(model: LinearizedModel, v: Tensor, *, batched: bool = False) -> Tensor:
    product = model.jvp(v, batched=batched)
    # a fresh tensor in the exchanged dtype, never the graph's own
    product = product.to(v.dtype, copy=True)
    return product.reshape(v.shape[0], -1) if batched else product.reshape(-1)


def _vjp(model: LinearizedModel, u: Tensor, *, batched: bool = False) -> Tensor:
    u = u.to(model.dtype)
    u = u.reshape((u.shape[0], *model.shape) if batched else model.shape)
    if model.shape[-1:] == (2,):
        u = aligned(u)
    return model.vjp(u, batched=batched)
