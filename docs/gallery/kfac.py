r"""
Solves preconditioned by Kronecker factors
==========================================

Newton and natural-gradient steps solve :math:`(G + \delta I) x = g`. With little
damping :math:`\delta` conjugate gradients take hundreds of products. A preconditioner
is an approximate inverse that is cheap: KFAC takes each layer's block of the
Gauss-Newton matrix as a Kronecker product of two small matrices, which are inverted on
their own.

It is an operator here, so SciPy's ``cg`` takes it as ``M``. Whether it helps is a
question of the network and the data, so it is measured: on 900 of scikit-learn's
handwritten digits.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import cg
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    NystromPreconditioner,
    gradient_and_loss,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# Digits, a network, and a right-hand side
# ----------------------------------------
#
# Sixty steps of training. The right-hand side is the gradient of the loss on digits
# that the network has not seen, as it is wanted for influences.

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images / 16), torch.tensor(labels)
data = [(X[:500], y[:500]), (X[500:900], y[500:900])]
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(60):
    optimizer.zero_grad()
    loss = loss_function(model(X[:900]), y[:900])
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

params = list(model.parameters())
risk = EmpiricalRisk(model, loss_function, params, data)
G = GGNLinearOperator(risk)
n = G.shape[0]
gradient, _ = gradient_and_loss(model, loss_function, params, [(X[900:], y[900:])])
g = G.space.to_vector(gradient).numpy(force=True)

# %%
# KFAC is an operator
# -------------------
#
# It is block diagonal, one block for each weight with its bias. The picture shows what it
# keeps of the Gauss-Newton matrix, and what it leaves out.

K = KFACLinearOperator(risk)
print(K, [" and ".join(names) for names in K.blocks])
dense = G @ np.eye(n)
approximation = K @ np.eye(n)
figure, axes = plt.subplots(ncols=2, figsize=(9, 4.2), layout="constrained")
for axis, (title, matrix) in zip(
    axes, {"Gauss-Newton": dense, "KFAC": approximation}.items(), strict=True
):
    with np.errstate(divide="ignore"):
        image = axis.imshow(np.log10(np.abs(matrix)), vmin=-8, vmax=-2)
    axis.set_title(f"{title}: log10 of absolute values")
figure.colorbar(image, ax=axes, shrink=0.8)

# %%
# Into SciPy
# ----------
#
# ``K.inverse`` takes the damping; all dampings share one eigendecomposition of each factor.

damping = 1e-4
A = G + damping * IdentityLinearOperator([(n,)], G.device, torch.float64)
M = K.inverse(damping=damping)
residuals = {}
for name, preconditioner in {"plain": None, "KFAC": M}.items():
    history = []
    x, info = cg(
        A,
        g,
        atol=1e-5 * np.linalg.norm(g),
        M=preconditioner,
        callback=lambda x, history=history: history.append(np.linalg.norm(A @ x - g)),
    )
    residuals[name] = np.array(history) / np.linalg.norm(g)
    print(f"{name}: {len(history)} steps, relative residual {residuals[name][-1]:.1e}")
    assert info == 0
    assert np.allclose(x, np.linalg.solve(dense + damping * np.eye(n), g), atol=1e-2)
assert len(residuals["KFAC"]) < len(residuals["plain"])

# %%
# Which preconditioner, which damping
# -----------------------------------
#
# EKFAC corrects the eigenvalues of KFAC. A Nyström preconditioner knows nothing of
# layers: it is made of products with the matrix itself, which are counted here, too.

dampings = (1e-2, 1e-3, 1e-4, 1e-5)
E = EKFACLinearOperator(risk)
products = {"plain": [], "KFAC": [], "EKFAC": [], "Nyström": []}
for delta in dampings:
    nystrom = NystromPreconditioner(G, delta)
    for name, M in {
        "plain": None,
        "KFAC": K.inverse(damping=delta),
        "EKFAC": E.inverse(damping=delta),
        "Nyström": nystrom,
    }.items():
        solver = CGInverseLinearOperator(G, damping=delta, rtol=1e-5, M=M)
        solver @ g
        products[name].append(solver.last_solve.num_matvecs)
        if name == "Nyström":
            products[name][-1] += nystrom.rank
print("damping " + "".join(f"{delta:>9.0e}" for delta in dampings))
for name, counts in products.items():
    print(f"{name:8}" + "".join(f"{count:9d}" for count in counts))

# %%
# The smaller the damping, the more there is to gain. It is not so everywhere: a network
# that knows its data by heart has few samples that contribute, and KFAC can then cost
# products.

figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for (name, curve), style in zip(residuals.items(), ("-", "--"), strict=True):
    axes[0].semilogy(curve, style, label=name)
axes[0].set_xlabel("steps of SciPy's cg")
axes[0].set_ylabel("relative residual")
axes[0].legend()
for (name, counts), marker in zip(products.items(), "osD^", strict=True):
    axes[1].loglog(dampings, counts, marker=marker, label=name)
axes[1].invert_xaxis()
axes[1].set_xlabel("damping")
axes[1].set_ylabel("products with the Gauss-Newton matrix")
axes[1].legend()
