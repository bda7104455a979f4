r"""
Newton's method with a trust region
===================================

:func:`scipy.optimize.minimize` has methods that use second derivatives, and asks for a
Hessian by ``hess=``. A function of the parameters may return an operator there: SciPy then
solves each Newton step by conjugate gradients, which need products only.

The data are the 569 patients of scikit-learn's breast cancer set; a small network is
trained to tell malignant tumours, with a penalty that keeps its weights small.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from torch import nn
from torchlinop import (
    HessianLinearOperator,
    IdentityLinearOperator,
    gradient_and_loss,
    monitor,
    verify,
)

torch.manual_seed(0)
torch.set_num_threads(1)

patients = load_breast_cancer()
X = torch.tensor((patients.data - patients.data.mean(axis=0)) / patients.data.std(axis=0))
y = torch.tensor(patients.target[:, None], dtype=torch.float64)
data = [(X[:300], y[:300]), (X[300:], y[300:])]
model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 1)).double()
loss_function = nn.BCEWithLogitsLoss()
params = list(model.parameters())

# %%
# The Hessian, with the penalty
# -----------------------------
#
# The penalty :math:`\tfrac\mu2 \|\theta\|^2` has a multiple of the identity as Hessian, and
# a sum of operators is an operator.

mu = 1e-2
H = HessianLinearOperator(model, loss_function, params, data)
n = H.shape[0]
penalized = H + mu * IdentityLinearOperator([(n,)], H.device, torch.float64)

# %%
# What SciPy calls
# ----------------
#
# SciPy has its parameters in one NumPy vector, the model has tensors. ``H.space`` cuts one
# into the other. The operator belongs to the model and follows it: to have the Hessian at
# ``x``, move the model there.


def move(x):
    """Copy a vector into the model, if it is not there already."""
    x = torch.from_numpy(np.array(x, dtype=float))
    with torch.no_grad():
        if not torch.equal(x, H.space.to_vector(params)):
            for p, part in zip(params, H.space.split(x), strict=True):
                p.copy_(part.view_as(p))


def objective(x):
    """Penalized loss and its gradient."""
    move(x)
    gradient, loss = gradient_and_loss(model, loss_function, params, data)
    g = H.space.to_vector(gradient).numpy(force=True)
    return loss.item() + mu / 2 * x @ x, g + mu * x


def hess(x):
    """The Hessian at ``x``: an operator."""
    move(x)
    return penalized


def hessp(x, v):
    """Product of the Hessian at ``x`` with ``v``."""
    return hess(x) @ v


# %%
# ``hess=`` or ``hessp=``
# -----------------------
#
# ``Newton-CG`` and ``trust-constr`` take an operator. ``trust-ncg`` and ``trust-krylov``
# refuse operators of any kind, and take the product. For comparison, L-BFGS gets along with
# gradients. A monitor counts the products, also those inside of the sum.

methods = {
    "Newton-CG": {"hess": hess, "options": {"xtol": 1e-10}},
    "trust-constr": {"hess": hess, "options": {"gtol": 1e-8}},
    "trust-ncg": {"hessp": hessp, "options": {"gtol": 1e-8}},
    "trust-krylov": {"hessp": hessp, "options": {"gtol": 1e-8}},
    "L-BFGS-B": {"options": {"gtol": 1e-8, "ftol": 0, "maxiter": 500}},
}
start = H.space.to_vector(params).numpy(force=True).copy()
histories, solutions = {}, {}
for method, options in methods.items():
    history = []
    with monitor(H, max_vectors=0) as log:

        def counted(x, history=history, log=log):
            """The objective; notes gradients, products and the gradient's norm."""
            value, g = objective(x)
            history.append((len(history) + 1, log.num_products, np.linalg.norm(g)))
            return value, g

        result = minimize(counted, start, jac=True, method=method, **options)
    histories[method], solutions[method] = np.array(history), result.x
    gradients, products, _ = history[-1]
    norm = np.linalg.norm(objective(result.x)[1])
    print(
        f"{method:12} loss {result.fun:.8f}, gradient norm {norm:.1e}, "
        f"{gradients:3d} gradients, {products:4d} products"
    )
    assert norm < 1e-5

# %%
# A minimum?
# ----------
#
# A vanishing gradient may belong to a saddle. The lowest eigenvalue of the Hessian tells.

move(solutions["trust-constr"])
print(verify.positive_semidefinite(penalized))

# %%
# What it took
# ------------
#
# The end of a Newton method is steep, since there each step squares the error. What it
# costs is products, here counted as two gradients each: on a problem as small and as
# well conditioned as this one L-BFGS gets along with less.

figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
styles = ("-", "--", "-.", ":", "-")
for (method, history), style in zip(histories.items(), styles, strict=True):
    gradients, products, norms = history.T
    least = np.minimum.accumulate(norms)
    axis.semilogy(gradients + 2 * products, least, style, label=method)
axis.set_xlabel("gradients, each product counted as two")
axis.set_ylabel("least norm of the gradient so far")
axis.legend()
