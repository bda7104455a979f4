"""Fisher matrices as sums of gradient outer products: sampled and empirical."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.losses import HessianProduct, LikelihoodLoss
from torchlinop.curvature.gauss_newton import BatchGaussNewton
from torchlinop.curvature.summed import SummedLinearOperator, as_risk
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk


class FisherMCLinearOperator(SummedLinearOperator):
    r"""Monte-Carlo approximation of the Fisher information matrix.

    .. math::
        F = \frac1Z \sum_n \frac1M \sum_{m=1}^M
            (J_n^\top s_{nm}) (J_n^\top s_{nm})^\top

    where :math:`s_{nm}` is the loss gradient with respect to the prediction at a label
    drawn from the model's own likelihood: softmax for ``CrossEntropyLoss``, Bernoulli for
    ``BCEWithLogitsLoss``, a Gaussian for ``MSELoss``. It is scaled with the square root
    of the datum's weight in the loss, so that :math:`F` has the GGN as expectation for
    every weighting, and approaches it like :math:`1/\sqrt M`. A datum is one vector along
    the class dimension (cross-entropy) or the last dimension.

    For one ``seed`` this is one fixed matrix, the same on every device and however the
    data is cut into batches, or spread over the ranks of a process group in their order.
    The global random state is neither read nor changed.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes; the loss is one of the
        three named above, the data comes in a fixed order.
    mc_samples
        Number :math:`M` of labels drawn for each datum.
    seed
        Which matrix.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Raises
    ------
    TypeError
        The loss has no known likelihood.
    ValueError
        ``mc_samples`` is no positive integer, or the data is shuffled.

    References
    ----------
    Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for
    natural gradient descent" (2019), https://arxiv.org/abs/1905.12558

    Examples
    --------
    >>> import torch
    >>> from torchlinop import FisherMCLinearOperator
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> F = FisherMCLinearOperator(
    ...     model, torch.nn.MSELoss(), model.parameters(), data, mc_samples=100_000
    ... )
    >>> F.to_dense().round(decimals=1)  # the GGN is the identity
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        *,
        mc_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        try:
            self.mc_samples = operator.index(mc_samples)
            self.seed = operator.index(seed)
        except TypeError as error:
            raise ValueError(
                f"mc_samples and seed have to be integers, got {mc_samples!r}, {seed!r}."
            ) from error
        if self.mc_samples < 1:
            raise ValueError(f"mc_samples has to be at least 1, got {mc_samples}.")
        risk = as_risk(model, loss_function, params, data, options)
        if not isinstance(risk.loss, LikelihoodLoss):
            raise TypeError(
                "Labels can be drawn for CrossEntropyLoss, MSELoss and "
                f"BCEWithLogitsLoss only; the likelihood of {risk.loss_function!r} is not "
                "known. Use GGNLinearOperator, which takes any loss."
            )
        sampled = _SampledGradients(self.mc_samples, self.seed)
        super().__init__(
            risk,
            BatchGaussNewton(risk, sampled),
            ordered=True,
            matrix=(self.mc_samples, self.seed),
        )


class EFLinearOperator(SummedLinearOperator):
    r"""Empirical Fisher: the uncentred second moment of the data's gradients.

    .. math:: E = \frac1Z \sum_n g_n g_n^\top, \qquad
              g_n = J_n^\top \nabla_f \ell(f_n, y_n)

    with :math:`\ell` the datum's summand of the risk, its weight included. A datum is one
    vector along the class dimension (cross-entropy) or the last dimension.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes. A callable loss has to be
        a sum or mean of independent terms, one for each datum.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    References
    ----------
    Kunstner, Balles, Hennig (2019), https://arxiv.org/abs/1905.12558, equation 3

    Examples
    --------
    One datum with residual 1: the gradient is ``2 x``.

    >>> import torch
    >>> from torchlinop import EFLinearOperator
    >>> f = lambda params, X: X @ params[0]
    >>> data = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0]]))]
    >>> E = EFLinearOperator(f, torch.nn.MSELoss(), [torch.zeros(2, 1)], data)
    >>> E.to_dense()
    tensor([[ 4.,  8.],
            [ 8., 16.]])
    """

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        super().__init__(risk, BatchGaussNewton(risk, _data_gradients))


class _SampledGradients:
    """Outer products of gradients at labels drawn from the model's likelihood."""

    def __init__(self, mc_samples: int, seed: int) -> None:
        self._mc_samples = mc_samples
        self._seed = seed
        #: state of the generator before each batch, so that any can be drawn again
        self._states: dict[int, Tensor] = {}

    def __call__(
        self, risk: EmpiricalRisk, prediction: Tensor, batch: Batch
    ) -> HessianProduct:
        loss = risk.loss
        assert isinstance(loss, LikelihoodLoss)
        if batch.position == 0:
            generator = risk.generator(self._seed, self._mc_samples)
        else:
            generator = Generator("cpu")
            generator.set_state(self._states[batch.position])
        samples = loss.sample_gradients(prediction, batch.y, self._mc_samples, generator)
        self._states[batch.position + 1] = generator.get_state()
        samples = samples / (self._mc_samples * risk.normalizer) ** 0.5
        return _outer_products(samples, risk.loss.row_dimension(prediction))


def _data_gradients(
    risk: EmpiricalRisk, prediction: Tensor, batch: Batch
) -> HessianProduct:
    """Outer products of the data's own gradients."""
    leaf = prediction.detach().requires_grad_()
    gradient = risk.loss.gradient(leaf, batch.y, batch.size, 1.0)
    gradient = risk.normalizer**-0.5 * gradient.detach()
    return _outer_products(gradient.unsqueeze(0), risk.loss.row_dimension(prediction))


def _outer_products(vectors: Tensor, dim: int | None) -> HessianProduct:
    r"""Block-diagonal :math:`\sum_m s_{nm} s_{nm}^\top` with one block for each datum.

    Parameters
    ----------
    vectors
        Shape ``(M, *prediction.shape)``.
    dim
        Negative dimension that holds a datum's components; None for scalars.
    """
    if dim is None:
        return partial(torch.mul, vectors.square().sum(0))
    if vectors.shape[0] == 1:
        return partial(_times_outer_product, vectors[0], dim)
    rows = vectors.movedim(dim, -1)  # (M, *data, C)
    rows = rows.reshape(rows.shape[0], -1, rows.shape[-1]).transpose(0, 1).contiguous()
    return partial(_times_outer_products, rows, dim)


def _times_outer_product(vector: Tensor, dim: int, u: Tensor) -> Tensor:
    return vector * (vector * u).sum(dim, keepdim=True)


def _times_outer_products(rows: Tensor, dim: int, u: Tensor) -> Tensor:
    moved = u.movedim(dim, -1)  # ([K,] *data, C)
    columns = moved.reshape(-1, *rows.shape[::2]).permute(1, 2, 0)  # (data, C, K)
    out = rows.mT @ (rows @ columns)
    return out.permute(2, 0, 1).reshape(moved.shape).movedim(-1, dim)
