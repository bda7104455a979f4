"""A posterior that is Gaussian around trained parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Generator, Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace
from torchlinop.autodiff.recording import recording
from torchlinop.data import DataSource
from torchlinop.gradients.per_sample import PerSampleGradients, output_cotangents
from torchlinop.kronecker.seeds import rows_of
from torchlinop.posterior.fit import Fit, positive_number, require_gaussian
from torchlinop.posterior.precision import inverse_root, logdet
from torchlinop.posterior.predictive import Likelihood, Predictive, positive_integer
from torchlinop.structured import StructuredLinearOperator


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    r"""Normal distribution of parameters around those of a trained model.

    Made by :func:`laplace`. With the curvature :math:`H` of the risk, the prior precision
    :math:`\delta` and a factor :math:`\tau` that turns the risk into a negative
    log-likelihood,

    .. math:: \theta \sim \mathcal N(\theta_*, (\tau H + \delta I)^{-1}).

    It is fixed: it does not follow the model.

    Attributes
    ----------
    mean : Tensor
        :math:`\theta_*`, shape ``(dim,)``.
    prior_precision : float
        :math:`\delta`, of a prior with mean zero.
    noise_variance : float
        :math:`\sigma^2` of the targets, for the squared error.
    """

    mean: Tensor
    prior_precision: float
    noise_variance: float
    _fit: Fit

    @property
    def space(self) -> ParameterSpace:
        """Order, names and shapes of the parameters: ``space.to_named(sample)``."""
        return self._fit.risk.space

    @property
    def log_likelihood(self) -> float:
        """Log-likelihood of the training data at the mean.

        For losses whose likelihood is not known minus the summed loss.
        """
        return self._fit.log_likelihood(self.noise_variance)

    @property
    def _scale(self) -> float:
        """The factor from the curvature of the risk to that of the log-likelihood."""
        fit = self._fit
        if fit.likelihood is Likelihood.GAUSSIAN:
            return fit.risk_scale / (2 * self.noise_variance)
        return fit.risk_scale

    @property
    def _damping(self) -> float:
        return self.prior_precision / self._scale

    # --------------------------------------------------------------- the distribution

    @functools.cached_property
    def root(self) -> TorchLinearOperator:
        r"""The symmetric root :math:`\Sigma^{1/2} = (\tau H + \delta I)^{-1/2}`."""
        with self._explained():
            return self._scale**-0.5 * inverse_root(self._fit.curvature, self._damping)

    @functools.cached_property
    def covariance(self) -> TorchLinearOperator:
        r"""The covariance :math:`\Sigma = (\tau H + \delta I)^{-1}`."""
        with self._explained():
            return self._fit.curvature.inverse(damping=self._damping) / self._scale

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what an error about a damped matrix means here."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                "There is no normal distribution with prior precision "
                f"{self.prior_precision:g}: {error} Here the damping is the prior "
                "precision over the weight of the data. Take a larger prior precision, or "
                "a positive semi-definite curvature (GGN, KFAC)."
            ) from error

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draw parameters, shape ``(num_samples, dim)``.

        Parameters
        ----------
        num_samples
            How many.
        seed
            Of the random numbers: the same for every device.

        Raises
        ------
        ValueError
            ``num_samples`` is no positive integer, or the covariance has no root.
        """
        num_samples = positive_integer("num_samples", num_samples)
        generator = Generator("cpu").manual_seed(seed)
        shape = (num_samples, self.space.dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return self.mean + self.root._product(noise.to(self.mean).T).T

    # -------------------------------------------------------------------- the evidence

    def log_marginal_likelihood(self) -> float:
        r"""Laplace's estimate of the logarithm of the evidence.

        .. math:: \log p(y \mid \theta_*) + \tfrac{P}{2} \log \delta
            - \tfrac{\delta}{2} |\theta_*|^2 - \tfrac12 \log\det(\tau H + \delta I)

        Exact for a linear model with Gaussian noise whose parameters maximize the
        posterior.

        Raises
        ------
        ValueError
            The precision is singular or indefinite.

        References
        ----------
        MacKay, "Bayesian interpolation", Neural Computation 4 (1992),
        https://doi.org/10.1162/neco.1992.4.3.415
        """
        dim, delta = self.space.dim, self.prior_precision
        with self._explained():
            determinant = logdet(self._fit.curvature, self._damping)
        half = 0.5 * (
            dim * math.log(delta)
            - delta * self.mean.double().square().sum().item()
            - dim * math.log(self._scale)
            - determinant
        )
        return self.log_likelihood + half

    def effective_dimension(self) -> float:
        r"""Number of determined parameters, :math:`P - \delta \operatorname{tr} \Sigma`."""
        covariance = self._fit.curvature.inverse(damping=self._damping)
        assert isinstance(covariance, StructuredLinearOperator)
        return self.space.dim - self._damping * covariance.trace().item()

    def with_parameters(
        self, *, prior_precision: float | None = None, noise_variance: float | None = None
    ) -> LaplacePosterior:
        """Return the posterior for another prior or noise, from the same curvature."""
        delta = self.prior_precision if prior_precision is None else prior_precision
        noise = self.noise_variance if noise_variance is None else noise_variance
        if noise != 1:
            require_gaussian(self._fit)
        return dataclasses.replace(
            self,
            prior_precision=positive_number("prior_precision", delta),
            noise_variance=positive_number("noise_variance", noise),
        )

    def tuned(self, parameters: Sequence[str] | None = None) -> LaplacePosterior:
        """Return the posterior whose marginal likelihood is largest.

        The mean of the parameters stays: train again with the weight decay that belongs to
        the prior (precision over the total weight of the data, for a mean) and repeat, if
        it is far from the one used.

        Parameters
        ----------
        parameters
            ``"prior_precision"``, ``"noise_variance"`` or both; by default both for the
            squared error, the first one for other losses.

        Raises
        ------
        ValueError
            A name is another one, or there is no maximum since all parameters are zero.
        """
        gaussian = self._fit.likelihood is Likelihood.GAUSSIAN
        known = ("prior_precision", "noise_variance")
        names = known[: 1 + gaussian] if parameters is None else tuple(parameters)
        if isinstance(parameters, str) or not names or not set(names) <= set(known):
            raise ValueError(
                f"parameters has to be a list of names among {list(known)}, got "
                f"{parameters!r}."
            )
        if "noise_variance" in names:
            require_gaussian(self._fit)
        if "prior_precision" in names and not bool(self.mean.any()):
            raise ValueError(
                "All parameters are zero: the larger the prior precision, the larger the "
                "marginal likelihood. Train the model first."
            )

        def at(logs: np.ndarray) -> LaplacePosterior:
            values = dict(zip(names, np.exp(logs).tolist(), strict=True))
            return self.with_parameters(**values)

        def loss(logs: np.ndarray) -> float:
            return -at(logs).log_marginal_likelihood()

        start = np.log([vars(self)[name] for name in names])
        corners = np.vstack([start, start + np.eye(len(start))])
        options = {"initial_simplex": corners, "xatol": 1e-4, "fatol": 1e-6, "maxfev": 400}
        result = minimize(loss, start, method="Nelder-Mead", options=options)
        return at(result.x)

    # ------------------------------------------------------------------- predictions

    def predictive(self, X: Any) -> Predictive:
        r"""Distribution of the predictions of the model, linearized in its parameters.

        Parameters
        ----------
        X
            What the model takes: a batch of inputs.

        Returns
        -------
        Predictive
            Normal with the model's own prediction as mean.

        Raises
        ------
        RuntimeError
            The parameters or other things have changed since the posterior was made.
        ValueError
            The model has several vectors of predictions for a sample.
        """
        risk = self._fit.risk
        if risk.changed() or risk.looks != self._fit.look:
            raise RuntimeError(
                "The model or its data has changed since the posterior was made, which is "
                "one around the parameters of then. Call laplace again."
            )
        source = DataSource(
            [(X, None)], risk.space.device, batch_size=risk.options.batch_size
        )
        source.accept(source.survey(lambda _: None, check=False))
        (batch,) = source
        with recording(risk.space.device, rules=False), torch.no_grad():
            mean = risk.predict([leaf.detach() for leaf in risk.leaves()], batch)
        vectors = rows_of(risk, mean, batch).split(mean.unsqueeze(0))
        if vectors.shape[2] != 1:
            raise ValueError(
                f"The model returns {vectors.shape[2]} vectors of predictions for each "
                f"sample (shape {tuple(mean.shape)}); there is a predictive distribution "
                "for one only. Write a model that returns one of them."
            )
        parts = []
        for rows in PerSampleGradients(risk, output_cotangents)(batch):
            samples, outputs, dim = rows.shape
            product = self.root._product(rows.reshape(-1, dim).T).T
            product = product.reshape(samples, outputs, dim)
            parts.append(product @ product.mT)
        return Predictive(
            vectors[0, :, 0].to(risk.space.dtype),
            torch.cat(parts),
            self._fit.likelihood,
            self.noise_variance,
        )
