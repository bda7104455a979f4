"""The Laplace approximation."""

from __future__ import annotations

from typing import Any

from torchlinop._space import ParameterSpace
from torchlinop.posterior.fit import fit_of, positive_number, require_gaussian
from torchlinop.posterior.posterior import LaplacePosterior
from torchlinop.posterior.precision import structured
from torchlinop.sources import EmpiricalRisk


def laplace(
    risk: EmpiricalRisk,
    curvature: Any,
    *,
    prior_precision: float = 1.0,
    noise_variance: float = 1.0,
) -> LaplacePosterior:
    r"""Laplace approximation of the posterior of a trained model's parameters.

    The negative log-likelihood is the loss, summed over the data (for a mean, the risk
    times its normaliser: a class weight of 2 counts a sample twice). The squared error is
    that of Gaussian targets, divided by :math:`2\sigma^2`. The prior is a normal
    distribution with mean zero and precision :math:`\delta`, so the parameters should have
    been trained with the weight decay :math:`\frac\delta2 |\theta|^2` beside the sum.

    Parameters
    ----------
    risk
        Model, loss, parameters and training data. For the parameters of the last layer
        alone, ``EmpiricalRisk(model, loss, model[-1].parameters(), data)``.
    curvature
        Of this risk, positive semi-definite: a :class:`~torchlinop.KFACLinearOperator`,
        :class:`~torchlinop.EKFACLinearOperator` or
        :class:`~torchlinop.GGNDiagonalLinearOperator`; a structured matrix, for instance
        low rank by the largest eigenvalues; or any operator, such as
        :class:`~torchlinop.GGNLinearOperator`, whose dense matrix is then formed.
    prior_precision
        :math:`\delta > 0`; see :meth:`LaplacePosterior.tuned`.
    noise_variance
        :math:`\sigma^2 > 0` of the targets, for ``MSELoss`` only.

    Returns
    -------
    LaplacePosterior
        Samples, marginal likelihood, predictions with their variances.

    Raises
    ------
    TypeError
        ``risk`` is no :class:`~torchlinop.EmpiricalRisk`.
    ValueError
        The matrix is not one on these parameters, or a number is not positive.

    References
    ----------
    MacKay, "A practical Bayesian framework for backpropagation networks", Neural
    Computation 4 (1992), https://doi.org/10.1162/neco.1992.4.3.448; Immer, Korzepa, Bauer,
    "Improving predictions of Bayesian neural nets via local linearization" (2021),
    https://arxiv.org/abs/2008.08400; Daxberger et al., "Laplace redux" (2021),
    https://arxiv.org/abs/2106.14806

    Examples
    --------
    One measurement of a number, with variance 1 and a standard normal prior:

    >>> import torch
    >>> from torchlinop import EmpiricalRisk, GGNLinearOperator, laplace
    >>> f = lambda params, X: X * params[0]
    >>> data = [(torch.ones(1, 1), torch.ones(1, 1))]
    >>> risk = EmpiricalRisk(f, torch.nn.MSELoss(), [torch.tensor([0.5])], data)
    >>> posterior = laplace(risk, GGNLinearOperator(risk))
    >>> posterior.covariance.to_dense()
    tensor([[0.5000]])
    >>> posterior.predictive(torch.tensor([[2.0]])).variance.round()
    tensor([[2.]])
    >>> posterior.sample(100).shape
    torch.Size([100, 1])
    """
    if not isinstance(risk, EmpiricalRisk):
        raise TypeError(
            f"Expected an EmpiricalRisk, got {type(risk).__name__}. Write risk = "
            "EmpiricalRisk(model, loss_function, params, data); laplace(risk, "
            "KFACLinearOperator(risk))."
        )
    ranks = risk.options.ranks
    if any(ranks.together(risk.changed, "making a Laplace approximation")):
        risk.survey()
    space = getattr(curvature, "space", None)
    shape = tuple(getattr(curvature, "shape", ()))
    names = space.names if isinstance(space, ParameterSpace) else risk.space.names
    if shape != (risk.space.dim,) * 2 or names != risk.space.names:
        other = "" if names == risk.space.names else f" of {', '.join(names)}"
        raise ValueError(
            f"The curvature has to be a matrix on the {risk.space.dim} parameters of the "
            f"risk ({', '.join(risk.space.names)}), got one of shape {shape}{other}."
        )
    fit = fit_of(risk, structured(curvature))
    if noise_variance != 1:
        require_gaussian(fit)
    return LaplacePosterior(
        risk.space.join([leaf.detach() for leaf in risk.leaves()]),
        positive_number("prior_precision", prior_precision),
        positive_number("noise_variance", noise_variance),
        fit,
    )
