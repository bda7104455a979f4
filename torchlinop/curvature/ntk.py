"""The neural tangent kernel."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Model, Parameters
from torchlinop.curvature.jacobian import JacobianLinearOperator
from torchlinop.sources import EmpiricalRisk, ModelOnData

#: bytes of the vectors between the two Jacobians
_CHUNK = 64 << 20


class NTKLinearOperator(TorchLinearOperator):
    r"""Empirical neural tangent kernel: inner products of the Jacobian's rows.

    With :math:`J_{nc}` the gradient of entry ``c`` of the prediction for sample ``n``, the
    matrix is

    - ``outputs="sum"``: :math:`K_{nm} = \sum_c J_{nc} \cdot J_{mc}`, samples x samples;
    - ``outputs=c``: :math:`K_{nm} = J_{nc} \cdot J_{mc}` for one entry ``c``;
    - ``outputs="all"``: :math:`J J^\top`, predictions x predictions, rows in the order of
      :class:`~torchlinop.JacobianLinearOperator`.

    Symmetric and positive semi-definite unless the columns have other data. Nothing is
    formed: a product is one with the transposed Jacobian and one with the Jacobian, for
    ``"sum"`` one for each entry of a prediction.

    Parameters
    ----------
    model, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes. The targets in ``data`` are not
        used; the order of the data is that of the rows. The first dimension of a
        prediction counts the samples.
    columns
        Data of the columns, for the kernel between two data sets: rows of test points,
        columns of training points. By default ``data``.
    outputs
        ``"sum"``, ``"all"``, or the number of an entry of a sample's prediction.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`, ``reduction`` excepted.

    Raises
    ------
    ValueError
        ``outputs`` is none of these, or predictions have not one row for each sample, or
        are of another size for the columns.
    TypeError
        Arguments are missing.

    References
    ----------
    Jacot, Gabriel, Hongler, "Neural tangent kernel" (2018),
    https://arxiv.org/abs/1806.07572

    Examples
    --------
    The kernel of a linear model is the inner product of its inputs:

    >>> import torch
    >>> from torchlinop import NTKLinearOperator
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> model = torch.nn.Linear(2, 3, bias=False)
    >>> K = NTKLinearOperator(model, model.parameters(), [(X, None)], outputs=0)
    >>> K.to_dense()
    tensor([[ 5., 11.],
            [11., 25.]])
    """

    def __init__(
        self,
        model: Model | ModelOnData | EmpiricalRisk,
        params: Parameters | None = None,
        data: Data | None = None,
        *,
        columns: Data | None = None,
        outputs: str | int = "sum",
        **options: Any,
    ) -> None:
        if isinstance(model, (ModelOnData, EmpiricalRisk)):
            if columns is not None:
                raise TypeError(
                    "For a kernel between two data sets pass (model, params, data, "
                    f"columns=...), not a {type(model).__name__}."
                )
        elif params is not None and not isinstance(params, Mapping):
            params = list(params)  # it may be an iterator, and is needed twice
        rows = JacobianLinearOperator(model, params, data, **options)
        other = rows
        if columns is not None:
            other = JacobianLinearOperator(model, params, columns, **options)
        self._setup(rows, other, outputs)

    def _setup(
        self, rows: JacobianLinearOperator, columns: JacobianLinearOperator, outputs: Any
    ) -> None:
        sizes = [_outputs_of_a_sample(J) for J in (rows, columns)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Predictions have {sizes[0]} entries for the rows and {sizes[1]} for the "
                "columns; a kernel needs the same."
            )
        self.outputs, self._entries = _entries(outputs, sizes[0])
        self._rows, self._columns = rows, columns
        per_sample = 1 if self._entries is None else sizes[0]
        shape = (rows.shape[0] // per_sample, columns.shape[0] // per_sample)
        super().__init__(shape, rows.torch_dtype, rows.device)

    @classmethod
    def _of(
        cls, rows: JacobianLinearOperator, columns: JacobianLinearOperator, outputs: Any
    ) -> NTKLinearOperator:
        kernel = cls.__new__(cls)
        kernel._setup(rows, columns, outputs)
        return kernel

    def _apply(self, x: Tensor) -> Tensor:
        if self._entries is None:
            return self._between(x)
        size, k = _outputs_of_a_sample(self._rows), x.shape[1]
        nbytes = k * self._rows.shape[1] * x.element_size()
        step = max(1, min(len(self._entries), _CHUNK // max(1, nbytes)))
        total = x.new_zeros(self.shape[0], k)
        for start in range(0, len(self._entries), step):
            chosen = self._entries[start : start + step]
            spread = x.new_zeros(self.shape[1], size, len(chosen), k)
            for i, c in enumerate(chosen):
                spread[:, c, i] = x
            product = self._between(spread.view(self.shape[1] * size, len(chosen) * k))
            product = product.view(self.shape[0], size, len(chosen), k)
            for i, c in enumerate(chosen):
                total += product[:, c, i]
        return total

    def _between(self, x: Tensor) -> Tensor:
        """Multiply with the rows' Jacobian times the columns' transposed one."""
        return self._rows._product(self._columns._adjoint()._product(x))

    def _adjoint(self) -> TorchLinearOperator:
        if self._rows is self._columns:
            return self
        return self._of(self._columns, self._rows, self.outputs)

    def refresh(self) -> None:
        """Forget everything that was kept, after changes that could not be noticed."""
        self._rows.refresh()
        if self._columns is not self._rows:
            self._columns.refresh()


def _outputs_of_a_sample(J: JacobianLinearOperator) -> int:
    sizes = {math.prod(shape[1:]) for shape in J.output_shapes}
    if len(sizes) > 1 or any(len(shape) == 0 for shape in J.output_shapes):
        raise ValueError(
            "The first dimension of a prediction has to count the samples, and the others "
            "have to be the same for all batches, got the shapes "
            f"{[tuple(shape) for shape in J.output_shapes]}."
        )
    return sizes.pop()


def _entries(outputs: Any, size: int) -> tuple[Any, range | None]:
    """Return the choice, and which entries of a prediction are summed over."""
    if isinstance(outputs, str):
        if outputs == "all":
            return outputs, None
        if outputs == "sum":
            return outputs, range(size)
    else:
        try:
            chosen = operator.index(outputs)
        except TypeError:
            chosen = size
        if not isinstance(outputs, bool) and -size <= chosen < size:
            return chosen % size, range(chosen % size, chosen % size + 1)
    raise ValueError(
        f"outputs has to be 'sum', 'all' or a number below {size}, got {outputs!r}."
    )
