r"""
Eigenvalues of a Hessian, by SciPy
==================================

How curved is the loss of a network, and in which directions? The answer is in the
eigenvalues and eigenvectors of its Hessian. The Hessian is a SciPy ``LinearOperator`` here,
so this page is about SciPy's solvers: ``eigsh`` at both ends of the spectrum and in its
middle, ``lobpcg`` for several eigenvectors at once.

The data are the 569 patients of scikit-learn's breast cancer set: thirty measurements of
cell nuclei, and whether the tumour is malignant. The network is so small that the dense
matrix can check every answer.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import eigsh, lobpcg
from sklearn.datasets import load_breast_cancer
from torch import nn
from torchlinop import (
    HessianLinearOperator,
    MINRESInverseLinearOperator,
    plot,
    single_threaded_blas,
    verify,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# A network and its data
# ----------------------
#
# Measurements are standardized. The data come in two batches of different size; the Hessian
# is that of the loss on all patients. Everything is float64.

patients = load_breast_cancer()
X = torch.tensor((patients.data - patients.data.mean(axis=0)) / patients.data.std(axis=0))
y = torch.tensor(patients.target[:, None], dtype=torch.float64)
data = [(X[:400], y[:400]), (X[400:], y[400:])]

model = nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 1)).double()
loss_function = nn.BCEWithLogitsLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    loss = loss_function(model(X), y)
    loss.backward()
    optimizer.step()
accuracy = ((model(X) > 0) == y).double().mean()
print(f"loss {loss.item():.4f}, {accuracy:.1%} of the patients told apart")

# %%
# The operator
# ------------
#
# It has a shape and a dtype, and it multiplies; nothing has been formed.

H = HessianLinearOperator(model, loss_function, model.parameters(), data)
print(H)
n = H.shape[0]
dense = np.linalg.eigvalsh(H @ np.eye(n))  # the check: affordable at this size only

# %%
# Both ends of the spectrum
# -------------------------
#
# ``which="LA"`` are the largest eigenvalues, ``"SA"`` the lowest: negative ones, since the
# network is not in a minimum. SciPy's BLAS threads get in the way of torch's on a CPU;
# :func:`~torchlinop.single_threaded_blas` keeps them away.

with single_threaded_blas():
    largest, vectors = eigsh(H, k=6, which="LA")
    lowest = eigsh(H, k=3, which="SA", return_eigenvectors=False)
print("largest", largest[::-1].round(5))
print("dense  ", dense[: -6 - 1 : -1].round(5))
print("lowest ", np.sort(lowest).round(6))
print("dense  ", dense[:3].round(6))
assert np.allclose(largest, dense[-6:])
assert np.allclose(np.sort(lowest), dense[:3])

# %%
# Without a dense matrix one checks by products: the residuals of the pairs, and whether an
# eigenvalue above the lowest of those found was missed.

print(verify.eigenpairs(H, largest, vectors))
print(verify.complete(H, largest, vectors))

# %%
# Several eigenvectors at once
# ----------------------------
#
# ``lobpcg`` multiplies with a block, here of four vectors. It starts from random ones.

start = np.random.default_rng(0).standard_normal((n, 4))
with single_threaded_blas():
    of_block, _ = lobpcg(H, start, tol=1e-6, maxiter=200)
print("lobpcg ", of_block.round(5))
assert np.allclose(of_block, largest[:-5:-1], rtol=1e-4)

# %%
# In the middle
# -------------
#
# For eigenvalues next to a shift ``eigsh`` needs a solve with :math:`H - \sigma I`. That
# matrix is indefinite, and an inverse is an operator like any other: MINRES, which takes
# indefinite matrices, goes in as ``OPinv``.

sigma = 0.01
shift_invert = MINRESInverseLinearOperator(H, damping=-sigma, rtol=1e-10)
with single_threaded_blas():
    middle = eigsh(H, k=4, sigma=sigma, OPinv=shift_invert, return_eigenvectors=False)
nearest = np.sort(dense[np.argsort(abs(dense - sigma))[:4]])
print(f"next to {sigma}:", np.sort(middle).round(6), "dense:", nearest.round(6))
assert np.allclose(np.sort(middle), nearest, atol=1e-8)

# %%
# What an eigenvector means
# -------------------------
#
# Along an eigenvector the loss is, at first, a parabola with the eigenvalue as
# curvature (and the gradient's slope). So walk along the first, the third and the
# sixth, and look.

flat = H.space.to_vector(list(model.parameters()))
steps = np.linspace(-1, 1, 41)


def loss_at(parameters):
    """Loss on all data at a flat vector of parameters."""
    with torch.no_grad():
        values = torch.func.functional_call(model, H.space.to_named(parameters), (X,))
        return loss_function(values, y).item()


figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
plot.eigenvalues(dense, ax=axes[0], label="dense matrix")
axes[0].loglog(range(1, 7), largest[::-1], "x", color="C3", markersize=9, label="eigsh")
axes[0].legend()
for rank, colour in zip((1, 3, 6), ("C0", "C1", "C2"), strict=True):
    direction = torch.from_numpy(vectors[:, -rank].copy())
    along = [loss_at(flat + step * direction) for step in steps]
    label = f"eigenvalue {largest[-rank]:.3g}"
    axes[1].plot(steps, along, color=colour, label=label)
axes[1].set_xlabel("step along the eigenvector")
axes[1].set_ylabel("loss")
axes[1].legend()
