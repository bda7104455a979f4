"""What the Hessian, the GGN and the Fisher matrices share: a sum over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from torchlinop._kept import KeptLinearizations, Linearizer
from torchlinop._operator import TorchLinearOperator
from torchlinop.autodiff.sums import SummedRows, sum_of_products
from torchlinop.sources import EmpiricalRisk, Source


class SummedLinearOperator(TorchLinearOperator):
    """A symmetric matrix that is a sum of one matrix for each batch.

    Not to be made by users.

    Parameters
    ----------
    source
        What is linearized.
    linearizer
        Makes a function of rows of a batch.
    ordered
        Whether the matrix depends on the order of the data.
    matrix
        Which of several matrices it is, by numbers that every rank has to have.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.
    """

    def __init__(
        self,
        source: Source,
        linearizer: Linearizer,
        *,
        ordered: bool = False,
        matrix: Sequence[int] = (),
    ) -> None:
        self.space = source.space
        n = self.space.dim
        super().__init__((n, n), self.space.dtype, self.space.device)
        self._maps: KeptLinearizations = KeptLinearizations(
            source, linearizer, ordered=ordered, gather=SummedRows
        )
        self._activity = f"multiplying with {type(self).__name__}{tuple(matrix) or ''}"

    @final
    def _apply(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return self._apply_vector(x.squeeze(1)).unsqueeze(1)
        return self._maps.retrying(self._total, self._share, x)

    @final
    def _apply_vector(self, x: Tensor) -> Tensor:
        return self._maps.retrying(self._total, self._share_of_vector, x)

    def _total(self, share: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self._maps.ranks.sum(partial(share, x), x, x.shape, self._activity)

    def _share(self, x: Tensor) -> Tensor:
        """Multiply with the matrix of this process's data."""
        with self._maps.current(x.shape[1]) as maps:
            return sum_of_products(maps, x, self._maps.experience)

    def _share_of_vector(self, x: Tensor) -> Tensor:
        """Multiply a vector with the matrix of this process's data."""
        total = None
        v = x.contiguous()
        with self._maps.current() as maps:
            for function in maps:
                part = function.row(v, self._maps.experience)
                total = part if total is None else total.add_(part)
        return torch.zeros_like(v) if total is None else total

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def refresh(self) -> None:
        """Forget everything that was kept, after changes that could not be noticed.

        Needed only after writing through ``.data`` on a GPU, or after changing something
        other than parameters, buffers and data (a Python attribute of the model).
        """
        self._maps.refresh()


def as_risk(
    model: Any, loss_function: Any, params: Any, data: Any, options: dict[str, Any]
) -> EmpiricalRisk:
    """Return the risk that an operator was given, or make one of its parts."""
    parts = {"loss_function": loss_function, "params": params, "data": data}
    if isinstance(model, EmpiricalRisk):
        given = [name for name, part in parts.items() if part is not None] + [*options]
        if given:
            raise TypeError(
                f"An EmpiricalRisk has its own {given[0]}. Pass the risk alone, or a model "
                "with loss_function, params and data."
            )
        return model
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise TypeError(
            f"Missing {', '.join(missing)}: pass (model, loss_function, params, data), or "
            "an EmpiricalRisk."
        )
    return EmpiricalRisk(model, loss_function, params, data, **options)
