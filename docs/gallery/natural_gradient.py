r"""
Natural gradients and other inverses
====================================

A curvature matrix is mostly wanted for its inverse. The natural gradient :math:`F^{-1} g`
is a gradient :math:`g` measured with the Fisher matrix :math:`F`; a Newton step is
:math:`H^{-1} g`; the smallest eigenvalues of a matrix are the largest of its inverse.
Here each of these inverses is an operator like any other: multiply a vector with it, and
it solves.

The data are the 442 patients of scikit-learn's diabetes set, ten measurements each, and
the progression of the disease a year later. The network is so small that dense matrices
can check every answer.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_diabetes
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    gradient_and_loss,
    multishift_cg,
    neumann_scale,
)
from torchlinop.reference import dense_ggn

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# A network part of the way through its training
# -----------------------------------------------
#
# Both inputs and targets are standardized; the data come in two uneven batches, as from a
# loader. Everything is float64, because matrices are to be inverted.

patients = load_diabetes(scaled=False)


def standardized(a):
    """Columns of mean 0 and standard deviation 1, as a tensor."""
    return torch.tensor((a - a.mean(axis=0)) / a.std(axis=0))


X = standardized(patients.data)
y = standardized(patients.target[:, None])
data = [(X[:250], y[:250]), (X[250:], y[250:])]
model = nn.Sequential(
    nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 1)
).double()
loss_function = nn.MSELoss()
params = dict(model.named_parameters())
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(60):
    optimizer.zero_grad()
    loss_function(model(X), y).backward()
    optimizer.step()
optimizer.zero_grad()

gradient, loss = gradient_and_loss(model, loss_function, params, data)
g = torch.cat([part.reshape(-1) for part in gradient]).numpy()
print(f"{len(g)} parameters, loss {loss.item():.3f}, gradient norm {np.linalg.norm(g):.2e}")

# %%
# The natural gradient
# --------------------
#
# For the squared error the Gauss-Newton matrix is the Fisher matrix, up to a factor. It
# has no inverse as it stands: directions that do not change any prediction have no
# curvature. A damping :math:`\delta` gives every direction some.

damping = 1e-2
G = GGNLinearOperator(model, loss_function, params, data)
inverse = CGInverseLinearOperator(G, damping=damping, rtol=1e-10)
natural_gradient = inverse @ g
print(inverse.last_solve)

# %%
# The vectors are NumPy arrays since ``g`` is one; a torch tensor or a CuPy array would
# have come back as such. After each product ``last_solve`` knows what it took. A solve
# that does not reach its tolerance warns, with advice; whoever wants just a few steps
# says so. The dense matrix, by ``torch.func`` and without any operator, tells how good
# they are:

matrix = dense_ggn(model, loss_function, params, data).numpy()
damped_matrix = matrix + damping * np.eye(len(g))
exact = np.linalg.solve(damped_matrix, g)
errors = {}
for steps in (5, 10, 20, 40):
    few = CGInverseLinearOperator(
        G, damping=damping, rtol=0, maxiter=steps, on_failure="ignore"
    )
    errors[steps] = np.linalg.norm(few @ g - exact) / np.linalg.norm(exact)
    print(f"{steps} steps: relative error {errors[steps]:.1e}")
assert errors[5] > 1e-2 > errors[20] > errors[40]
assert np.allclose(natural_gradient, exact, rtol=1e-6, atol=1e-10)

# %%
# Many right-hand sides
# ---------------------
#
# ``inverse @ B`` solves for all columns in one Krylov space: they help one another. The
# whole inverse, which is its product with the identity, takes a few block steps.

inverse_matrix = inverse @ np.eye(len(g))
print(inverse.last_solve)
assert np.allclose(inverse_matrix, np.linalg.inv(damped_matrix), atol=1e-6)

figure, axes = plt.subplots(ncols=2, figsize=(9, 4), layout="constrained")
for axis, (title, shown) in zip(
    axes,
    (("Damped GGN", damped_matrix), ("its inverse", inverse_matrix)),
    strict=True,
):
    with np.errstate(divide="ignore"):  # exact zeros stay blank
        image = axis.imshow(np.log10(np.abs(shown)))
    axis.set_title(f"{title}: log10 of absolute values")
    figure.colorbar(image, ax=axis, shrink=0.7)

# %%
# A Neumann series
# ----------------
#
# :math:`A^{-1} = \alpha \sum_k (I - \alpha A)^k` needs nothing but products, and is a
# fixed matrix whatever the vector. It converges if :math:`\alpha` is below :math:`2 /
# \lambda_{\max}`; ``eigsh`` takes the operator and finds that eigenvalue,
# ``neumann_scale`` is a safe choice without it.

shapes = [p.shape for p in params.values()]
A = G + damping * IdentityLinearOperator(shapes, G.device, torch.float64)
(largest,) = eigsh(A, k=1, which="LM", return_eigenvectors=False)
print(f"largest eigenvalue {largest:.3f}; safe scale {neumann_scale(A):.3f}")

figure, axes = plt.subplots(ncols=3, figsize=(12, 4), layout="constrained")
pictures = {}
for terms in (10, 300):
    series = NeumannInverseLinearOperator(A, num_terms=terms, scale=1.9 / largest)
    pictures[f"Neumann series, {terms} terms"] = series @ np.eye(len(g))
pictures["inverse"] = inverse_matrix
for axis, (title, shown) in zip(axes, pictures.items(), strict=True):
    with np.errstate(divide="ignore"):
        image = axis.imshow(np.log10(np.abs(shown)), vmin=-5, vmax=2)
    axis.set_title(title)
figure.colorbar(image, ax=axes, shrink=0.7, label="log10 of absolute values")

# %%
# A scale that is too large is not a wrong answer but an error:

try:
    NeumannInverseLinearOperator(A, num_terms=100, scale=2.5 / largest) @ g
except np.linalg.LinAlgError as error:
    print(error)

# %%
# One damping after another
# -------------------------
#
# How much damping? The Krylov space of ``G`` and ``g`` does not depend on it, so the
# solutions for all dampings cost the products of one.

dampings = np.logspace(-4, 1, 26)
steps, report = multishift_cg(G, g, dampings, rtol=1e-8)
print(f"{len(dampings)} dampings with {report.num_matvecs} products")
decrease = []
for step in steps:
    with torch.no_grad():
        shifted = {}
        start = 0
        for name, p in params.items():
            part = torch.from_numpy(step[start : start + p.numel()]).reshape(p.shape)
            shifted[name] = p - part
            start += p.numel()
        prediction = torch.func.functional_call(model, shifted, (X,))
        decrease.append(loss.item() - loss_function(prediction, y).item())

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
axis.semilogx(dampings, decrease, marker=".")
axis.axhline(0, color="0.7", linewidth=1)
axis.set_ylim(-2 * max(decrease), 1.2 * max(decrease))  # small dampings go far below
axis.set_xlabel("damping")
axis.set_ylabel("decrease of the loss by one step")

# %%
# Preconditioning
# ---------------
#
# A small damping makes a large condition number. The Nyström preconditioner finds the
# large eigenvalues from a random sketch and leaves the rest to conjugate gradients. It is
# an operator, too: SciPy's own solvers take it as ``M``.

small = 1e-3
M = NystromPreconditioner(G, damping=small)
for name, preconditioner in (("plain", None), (f"Nyström of rank {M.rank}", M)):
    solver = CGInverseLinearOperator(G, damping=small, rtol=1e-8, M=preconditioner)
    solver @ g
    print(f"{name}: {solver.last_solve.num_matvecs} products")

# %%
# Eigenvalues next to a shift
# ---------------------------
#
# ``eigsh`` finds eigenvalues at the end of a spectrum. For those in the middle it asks
# for a solve with :math:`H - \sigma I`, which is indefinite: the work of MINRES.

H = HessianLinearOperator(model, loss_function, params, data)
spectrum = np.linalg.eigvalsh(H.to_dense().numpy())
sigma = 0.5 * (spectrum[0] + spectrum[1])
shift_invert = MINRESInverseLinearOperator(H, damping=-sigma, rtol=1e-12)
values = eigsh(H, k=3, sigma=sigma, OPinv=shift_invert, return_eigenvectors=False)
nearest = spectrum[np.argsort(abs(spectrum - sigma))[:3]]
print("found ", np.sort(values))
print("dense ", np.sort(nearest))
assert np.allclose(np.sort(values), np.sort(nearest), rtol=1e-6, atol=0)

# %%
# The whole spectrum, on an axis that is linear around zero, and the three that were found:

figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained")
axis.eventplot(spectrum, lineoffsets=0, linelengths=1, color="0.6", label="dense matrix")
axis.plot(np.sort(values), np.zeros(3), "x", color="C3", markersize=10, label="eigsh")
axis.axvline(sigma, linestyle="--", label="shift")
axis.set_xscale("symlog", linthresh=1e-3)
axis.set_yticks([])
axis.set_ylim(-0.6, 1.9)
axis.set_xlabel("eigenvalue of the Hessian")
axis.legend(loc="upper right")
