r"""
Spectra with outliers
=====================

The Gauss-Newton matrix of a classifier has two kinds of eigenvalues: a few large ones, one
fewer than there are classes, and a bulk next to zero. A spectral density shows both without
computing a single eigenvalue, from products with a few random vectors.

The data are scikit-learn's 1,797 handwritten digits. The network is so small that the dense
matrix can check what the picture shows.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator, estimate

torch.manual_seed(0)
torch.set_num_threads(1)

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:1500] / 16), torch.tensor(labels[:1500])
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.LBFGS(
    model.parameters(), max_iter=18, line_search_fn="strong_wolfe"
)


def closure():
    """Loss and its gradient, for the optimizer."""
    optimizer.zero_grad()
    loss = loss_function(model(X), y)
    loss.backward()
    return loss


optimizer.step(closure)
data = [(X[:800], y[:800]), (X[800:], y[800:])]
G = GGNLinearOperator(model, loss_function, model.parameters(), data)
H = HessianLinearOperator(model, loss_function, model.parameters(), data)

# %%
# The density
# -----------
#
# Ten random vectors, eighty products with each. What is drawn is the density of
# eigenvalues, smoothed, with a band of two standard errors.

density = estimate.spectral_density(G, num_probes=10, num_steps=80)
print(density)

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
x = density.grid(2000)
low, high = density.band(x)
axis.fill_between(x, np.maximum(low, 1e-6), high, alpha=0.3)
axis.semilogy(x, density.density(x))
axis.set_ylim(1e-4, 3 * density.density(x).max())
axis.set_xlabel("eigenvalue")
axis.set_ylabel("density of eigenvalues")

# %%
# Most eigenvalues are tiny; on a logarithmic scale one sees how tiny, and that the
# Hessian has negative ones as well.

of_hessian = estimate.spectral_density(H, num_probes=10, num_steps=80)
sizes = np.geomspace(1e-6, 1, 1000)
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
axis.semilogx(sizes, density.log_density(sizes), label="Gauss-Newton")
axis.semilogx(sizes, of_hessian.log_density(sizes), label="Hessian, positive")
axis.semilogx(
    sizes, of_hessian.log_density(sizes, sign=-1), "--", label="Hessian, negative"
)
axis.set_xlabel("size of eigenvalue")
axis.set_ylabel("share of eigenvalues per decade")
axis.legend()

# %%
# Nine outliers
# -------------
#
# There are ten classes, and the outliers are nine. ``eigsh`` finds them, each with a bound
# for its error; the dense matrix agrees. The density counts them, too, with an error bar.

found = estimate.eigsh(G, k=10)
print(found)
dense = torch.linalg.eigvalsh(G.to_dense())
assert torch.allclose(found.eigenvalues, dense[-10:], rtol=1e-6)
threshold = float(dense[-10:-8].mean())
count = density.count_above(threshold)
print(f"eigenvalues above {threshold:.3g}: {count}")
assert abs(count.value - 9) < 3 * count.stderr + 0.5

# %%
# Numbers with error bars
# -----------------------
#
# The trace, the effective dimension and the log-determinant of the damped matrix cost
# products, too, and say how far they can be trusted.

damping = 1e-3
trace = estimate.trace(G, method="hutch++", rtol=0.01)
dimension = estimate.effective_dimension(G, damping=damping, rtol=0.02)
logdet = estimate.logdet(G, damping=damping, rtol=0.01)
exact = (
    dense.sum().item(),
    (dense / (dense + damping)).sum().item(),
    (dense + damping).log().sum().item(),
)
for name, value, truth in zip(
    ("trace", "effective dimension", "log det"),
    (trace, dimension, logdet),
    exact,
    strict=True,
):
    print(f"{name:20} {value}; exactly {truth:.4f}")
    assert abs(value.value - truth) < 4 * value.stderr + 1e-9

# %%
# Layer by layer
# --------------
#
# One call gives a density for the diagonal block of each layer.

layers = estimate.layer_densities(G, num_probes=5, num_steps=60)
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for name, layer in layers.items():
    axis.semilogx(sizes, layer.log_density(sizes), label=f"{model[int(name)]}")
axis.set_xlabel("eigenvalue of the layer's block")
axis.set_ylabel("share of eigenvalues per decade")
axis.legend()
