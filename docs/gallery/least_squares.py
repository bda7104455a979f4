r"""
Nonlinear least squares with certified answers
==============================================

:func:`scipy.optimize.least_squares` takes the Jacobian as a ``LinearOperator``, if it
is told to solve its steps by ``lsmr``. Here the Jacobian is that of a torch function:
nobody writes derivatives, and it is not formed.

The problems are two of the nonlinear regression sets of NIST's *Statistical Reference
Datasets* (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml). NIST publishes
parameters and their standard deviations to eleven digits, computed in extended
precision. *Misra1a* is about the adsorption of water (two parameters, of low
difficulty), *Thurber* about the mobility of electrons in silicon (seven parameters, of
high difficulty).
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import least_squares
from torchlinop import (
    DiagonalLinearOperator,
    JacobianLinearOperator,
    LSMRInverseLinearOperator,
)

torch.set_num_threads(1)


# %%
# The data, as NIST publishes them
# --------------------------------


@dataclass
class Problem:
    """A curve through data, with the certified parameters and standard deviations."""

    curve: object
    x: torch.Tensor
    y: torch.Tensor
    start: list
    certified: np.ndarray
    deviations: np.ndarray


def numbers(text):
    """A float64 tensor of the numbers in a text."""
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


misra1a = Problem(
    curve=lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
    x=numbers(
        "77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0"
    ),
    y=numbers(
        "10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 "
        "81.78"
    ),
    start=[250, 5e-4],
    certified=np.array([2.3894212918e2, 5.5015643181e-4]),
    deviations=np.array([2.7070075241, 7.2668688436e-6]),
)
thurber = Problem(
    curve=lambda b, x: (
        (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3)
        / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)
    ),
    x=numbers(
        "-3.067 -2.981 -2.921 -2.912 -2.840 -2.797 -2.702 -2.699 -2.633 -2.481 -2.363 "
        "-2.322 -1.501 -1.460 -1.274 -1.212 -1.100 -1.046 -0.915 -0.714 -0.566 -0.545 "
        "-0.400 -0.309 "
        "-0.109 -0.103 0.010 0.119 0.377 0.790 0.963 1.006 1.115 1.572 1.841 2.047 2.200"
    ),
    y=numbers(
        "80.574 84.248 87.264 87.195 89.076 89.608 89.868 90.101 92.405 95.854 100.696 "
        "101.060 401.672 390.724 567.534 635.316 733.054 759.087 894.206 990.785 1090.109 "
        "1080.914 1122.643 1178.351 1260.531 1273.514 1288.339 1327.543 1353.863 1414.509 "
        "1425.208 1421.384 1442.962 1464.350 1468.705 1447.894 1457.628"
    ),
    start=[1300, 1500, 500, 75, 1, 0.4, 0.05],
    certified=np.array(
        [
            1.2881396800e3,
            1.4910792535e3,
            5.8323836877e2,
            7.5416644291e1,
            9.6629502864e-1,
            3.9797285797e-1,
            4.9727297349e-2,
        ]
    ),
    deviations=np.array(
        [
            4.6647963344,
            3.9571156086e1,
            2.8698696102e1,
            5.5675370270,
            3.1333340687e-2,
            1.4984928198e-2,
            6.5842344623e-3,
        ]
    ),
)

# %%
# A Jacobian that follows
# -----------------------
#
# ``from_function`` makes the Jacobian of a torch function at a tensor. The operator
# follows the tensor: ``least_squares`` asks for the Jacobian at a new point, the values
# are copied into the tensor, and the next product is that of the new Jacobian.


def fit(problem):
    """Solve; return the parameters, their standard deviations, and what SciPy says."""
    b = torch.tensor(problem.start, dtype=torch.float64)

    def residuals_of(b):
        return problem.curve(b, problem.x) - problem.y

    def residuals(values):
        return residuals_of(torch.from_numpy(values)).numpy()

    J = JacobianLinearOperator.from_function(residuals_of, b)

    def jacobian(values):
        b.copy_(torch.from_numpy(values))
        return J

    result = least_squares(
        residuals,
        np.array(problem.start, dtype=float),
        jac=jacobian,
        tr_solver="lsmr",
        x_scale=np.abs(problem.start),
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        tr_options={"atol": 1e-14, "btol": 1e-14},
    )
    jacobian(result.x)
    return result, J


# %%
# Against the certificate
# -----------------------
#
# The standard deviations are :math:`s \sqrt{\operatorname{diag}(J^\top J)^{-1}}` with
# the residual standard deviation :math:`s`. :math:`(J^\top J)^{-1} = J^+ (J^+)^\top`,
# and the pseudo-inverse :math:`J^+` is an operator, too. Columns of very different size
# are scaled first.

fits = {}
for name, problem in {"Misra1a": misra1a, "Thurber": thurber}.items():
    result, J = fit(problem)
    m, n = J.shape
    scale = np.abs(result.x)
    scaled = J @ DiagonalLinearOperator(torch.from_numpy(scale))
    inverse = LSMRInverseLinearOperator(scaled, atol=1e-12, btol=1e-12)
    pseudo_inverse = scale[:, None] * (inverse @ np.eye(m))
    s = np.sqrt(2 * result.cost / (m - n))
    deviations = s * np.linalg.norm(pseudo_inverse, axis=1)
    errors = np.abs(result.x / problem.certified - 1)
    of_deviations = np.abs(deviations / problem.deviations - 1)
    print(
        f"{name}: {result.nfev} evaluations, parameters to {errors.max():.1e}, standard "
        f"deviations to {of_deviations.max():.1e} of the certified values"
    )
    assert errors.max() < 1e-6
    assert of_deviations.max() < 1e-4
    fits[name] = problem, result.x, J, errors, of_deviations

# %%
# The curves, with a band
# -----------------------
#
# The uncertainty of the curve follows from that of the parameters: at each point the
# curve's own gradient, a Jacobian again, meets the covariance.

figure, axes = plt.subplots(ncols=3, figsize=(13, 4), layout="constrained")
for axis, (name, (problem, x, J, errors, of_deviations)) in zip(
    axes, fits.items(), strict=False
):
    b = torch.from_numpy(x)
    grid = torch.linspace(problem.x.min(), problem.x.max(), 200, dtype=torch.float64)
    of_curve = JacobianLinearOperator.from_function(
        lambda b, problem=problem, grid=grid: problem.curve(b, grid), b
    )
    middle = problem.curve(b, grid).numpy()
    residual = problem.curve(b, problem.x).numpy() - problem.y.numpy()
    s2 = residual @ residual / (len(residual) - len(x))
    covariance = s2 * np.linalg.inv(J.T @ (J @ np.eye(len(x))))
    gradients = of_curve @ np.eye(len(x))
    width = 2 * np.sqrt(np.einsum("gi,ij,gj->g", gradients, covariance, gradients))
    axis.fill_between(grid, middle - width, middle + width, alpha=0.3)
    axis.plot(grid, middle)
    axis.plot(problem.x, problem.y, "k.", markersize=5)
    axis.set_title(f"{name}: two standard errors")
    of_parameters = np.arange(len(x))
    axes[2].semilogy(of_parameters, errors, "o-", label=f"{name}, parameters")
    axes[2].semilogy(of_parameters, of_deviations, "s--", label=f"{name}, deviations")
axes[2].set_xlabel("parameter")
axes[2].set_title("relative distance from NIST's values")
axes[2].legend(fontsize="small")
