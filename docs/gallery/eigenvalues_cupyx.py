r"""
The same on a GPU, by CuPy
==========================

The object that went into SciPy's solvers goes into those of
:mod:`cupyx.scipy.sparse.linalg` as well. The model is on the GPU, CuPy's arrays go in
and come out, and nothing leaves the GPU: CuPy and PyTorch see the same memory.

Where this page is made without a GPU, the very same lines run with NumPy and SciPy. The
data are scikit-learn's handwritten digits.
"""

import importlib.util

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    gradient_and_loss,
    verify,
)

torch.manual_seed(0)

# %%
# Two lines that differ
# ---------------------
#
# The arrays' library and the solvers' are the only things to choose.

if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
    import cupy as xp
    import cupyx.scipy.sparse.linalg as solvers

    device = "cuda"
else:
    import numpy as xp
    import scipy.sparse.linalg as solvers

    device = "cpu"
print(f"on {device}, with {xp.__name__} and {solvers.__name__}")

# %%
# The model is on the device. Batches are copied there when they are read.

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(labels)
data = list(zip(X.split(600), y.split(600), strict=True))
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(device)
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(60):
    optimizer.zero_grad()
    loss_function(model(X.to(device)), y.to(device)).backward()
    optimizer.step()

arguments = model, loss_function, list(model.parameters()), data
H = HessianLinearOperator(*arguments)
G = GGNLinearOperator(*arguments)
J = JacobianLinearOperator(model, list(model.parameters()), data[-1:])
n = H.shape[0]
print(H)

# %%
# A product
# ---------

v = xp.ones(n, dtype=xp.float32)
print(type(H @ v))

# %%
# Eigenvalues
# -----------
#
# CuPy's ``eigsh`` takes an absolute tolerance and says nothing when it has not converged.
# So what it returned is checked, by products.

eigenvalues, eigenvectors = solvers.eigsh(H, k=8, which="LA")
print(eigenvalues[::-1])
print(verify.eigenpairs(H, eigenvalues, eigenvectors, rtol=1e-3))

# %%
# Blocks
# ------
#
# ``lobpcg`` multiplies with several vectors at once; CuPy does so, too, with our operators.

start = xp.random.standard_normal((n, 4)).astype(xp.float32)
of_block, _ = solvers.lobpcg(G, start, tol=1e-3, maxiter=100)
print(of_block)

# %%
# A linear system
# ---------------
#
# The natural gradient: Gauss-Newton matrix plus damping. The sum of two operators is an
# operator, also for CuPy. The gradient is a torch tensor; ``xp.asarray`` shares its memory.

gradient, _ = gradient_and_loss(*arguments)
g = xp.asarray(H.space.to_vector(gradient).detach())
A = G + 1e-2 * IdentityLinearOperator([(n,)], G.device, torch.float32)
step, info = solvers.cg(A, g, atol=0.0)
print(verify.solution(A, step, g, rtol=1e-4))
assert info == 0

# %%
# Singular values of a rectangular operator
# -----------------------------------------
#
# The Jacobian of the last batch: 597 digits times ten outputs.

singular = solvers.svds(J, k=8, return_singular_vectors=False)
print(J.shape, xp.sort(singular)[::-1])

# %%
# Arrays go to the host for the picture only.


def on_host(array):
    """A NumPy array, for Matplotlib."""
    return array.get() if hasattr(array, "get") else array


figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for values, label in ((eigenvalues, "Hessian"), (of_block, "Gauss-Newton")):
    descending = sorted(on_host(values), reverse=True)
    axes[0].plot(range(1, len(descending) + 1), descending, "o-", label=label)
axes[0].set_xlabel("rank")
axes[0].set_ylabel("eigenvalue")
axes[0].set_ylim(bottom=0)
axes[0].legend()
axes[1].plot(range(1, 9), sorted(on_host(singular), reverse=True), "o-", color="C2")
axes[1].set_xlabel("rank")
axes[1].set_ylabel("singular value of the Jacobian")
axes[1].set_ylim(bottom=0)
