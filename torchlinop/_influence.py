"""Influence of training samples: what a model would be without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.gradients.per_sample import sample_rows
from torchlinop.sources import EmpiricalRisk


def influence(inverse: Any, train: EmpiricalRisk, test: EmpiricalRisk) -> Tensor:
    r"""Predicted changes of test losses when training samples are left out.

    .. math:: I_{nm} = \nabla L^{\text{test}}_m \cdot A^{-1} \nabla L_n

    where :math:`L = \sum_n L_n` is the training risk, :math:`L^{\text{test}} = \sum_m
    L^{\text{test}}_m` the test risk (weights and normalisers are in the summands) and
    :math:`A` the Hessian of what was minimized, with its weight decay :math:`\delta I`. To
    first order the minimizer moves by :math:`A^{-1} \nabla L_n` when the summand of sample
    ``n`` is taken away (while the normaliser stays). A positive number: the loss would
    rise, the sample helps. ``influence(...).sum(1)`` is about the whole test risk; with
    ``reduction="sum"`` in the test risk columns are about the losses of single samples.

    Parameters
    ----------
    inverse
        An operator or matrix :math:`A^{-1}`: ``EKFACLinearOperator(train)
        .inverse(damping=...)``, or ``CGInverseLinearOperator(HessianLinearOperator(train),
        damping=...)`` for the exact one.
    train
        Model, loss and training data, in a fixed order.
    test
        The same model and parameters on other data, in a fixed order.

    Returns
    -------
    Tensor
        Shape ``(training samples, test samples)``. On the way, ``dim`` numbers are held
        for each test sample.

    Raises
    ------
    TypeError
        ``train`` or ``test`` is no :class:`~torchlinop.EmpiricalRisk`.
    ValueError
        The parameters or the inverse do not fit, or data is shuffled.

    References
    ----------
    Koh and Liang, "Understanding black-box predictions via influence functions" (2017),
    https://arxiv.org/abs/1703.04730; Grosse et al., "Studying large language model
    generalization with influence functions" (2023), https://arxiv.org/abs/2308.03296, for
    EKFAC

    Examples
    --------
    Two numbers and their mean. Without one of them the fit moves to the other, whose
    squared distance becomes smaller:

    >>> import torch
    >>> from torchlinop import CholeskyInverseLinearOperator, EmpiricalRisk
    >>> from torchlinop import HessianLinearOperator, influence
    >>> f = lambda params, X: X * params[0]
    >>> y = torch.tensor([[1.0], [3.0]])
    >>> risk = EmpiricalRisk(
    ...     f, torch.nn.MSELoss(), [torch.tensor([2.0])], [(torch.ones(2, 1), y)]
    ... )
    >>> inverse = CholeskyInverseLinearOperator(HessianLinearOperator(risk))
    >>> influence(inverse, risk, risk)
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    inverse = _inverse(inverse, train, test)
    columns = [inverse._product(rows.T.contiguous()) for rows in sample_rows(test)]
    products = torch.cat(columns, dim=1)  # (dim, test samples)
    return torch.cat([rows.to(products.dtype) @ products for rows in sample_rows(train)])


def self_influence(inverse: Any, train: EmpiricalRisk) -> Tensor:
    r"""Predicted changes of training samples' own losses when they are left out.

    The diagonal of ``influence(inverse, train, train)``, without the rest: at least zero
    for a positive definite inverse, and large for samples that the model had to memorize,
    among which are wrong labels.

    Parameters
    ----------
    inverse, train
        As for :func:`influence`.

    Returns
    -------
    Tensor
        Shape ``(training samples,)``.

    Raises
    ------
    TypeError, ValueError
        As for :func:`influence`.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import EKFACLinearOperator, EmpiricalRisk, self_influence
    >>> model = torch.nn.Linear(2, 3)
    >>> data = [(torch.rand(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))]
    >>> risk = EmpiricalRisk(model, torch.nn.CrossEntropyLoss(), model.parameters(), data)
    >>> inverse = EKFACLinearOperator(risk).inverse(damping=1e-2)
    >>> bool((self_influence(inverse, risk) > 0).all())
    True
    """
    inverse = _inverse(inverse, train, train)
    parts = []
    for rows in sample_rows(train):
        product = inverse._product(rows.T.contiguous()).T
        parts.append((rows.to(product.dtype) * product).sum(1))
    return torch.cat(parts)


def _inverse(
    inverse: Any, train: EmpiricalRisk, test: EmpiricalRisk
) -> TorchLinearOperator:
    for name, risk in (("train", train), ("test", test)):
        if not isinstance(risk, EmpiricalRisk):
            raise TypeError(
                f"{name} has to be an EmpiricalRisk, got {type(risk).__name__}. Write "
                "EmpiricalRisk(model, loss_function, params, data)."
            )
    spaces = train.space, test.space
    if spaces[0].names != spaces[1].names or spaces[0].shapes != spaces[1].shapes:
        raise ValueError(
            "Training and test risk have different parameters: "
            f"{', '.join(spaces[0].names)} and {', '.join(spaces[1].names)}."
        )
    operator = aslinearoperator(inverse, device=train.space.device)
    dim = train.space.dim
    if tuple(operator.shape) != (dim, dim):
        raise ValueError(
            f"The inverse has shape {tuple(operator.shape)}, but there are {dim} "
            "parameters."
        )
    return operator
