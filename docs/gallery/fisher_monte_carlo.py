r"""
The Fisher matrix from sampled labels
=====================================

The Fisher information matrix of a classifier is the mean, over the labels that the *model*
finds likely, of the outer product of a gradient with itself. It can be had in two ways.

- Exactly: for cross-entropy and squared error it is the Gauss-Newton matrix (GGN), whose
  products need the Jacobian of the model.
- By chance: draw :math:`M` labels for each sample from the model's own probabilities, and
  average the outer products of the gradients that these labels would give. A product needs
  gradients only, and the error falls like :math:`1/\sqrt M`.

This page draws more and more labels and watches the second approach the first. The data are
the 178 wines of scikit-learn's set, thirteen measurements each, from three growers.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_wine
from torch import nn
from torchlinop import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# Wines, and a network that has begun to tell them apart
# ------------------------------------------------------

wines = load_wine()
X = torch.tensor((wines.data - wines.data.mean(axis=0)) / wines.data.std(axis=0))
y = torch.tensor(wines.target)
data = [(X[:100], y[:100]), (X[100:], y[100:])]
model = nn.Sequential(nn.Linear(13, 4), nn.Tanh(), nn.Linear(4, 3)).double()
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(20):
    optimizer.zero_grad()
    loss_function(model(X), y).backward()
    optimizer.step()

# %%
# Both matrices belong to one empirical risk, which reads and checks the data once. They
# are operators; with 71 parameters their dense matrices fit on a page.

risk = EmpiricalRisk(model, loss_function, model.parameters(), data)
G = GGNLinearOperator(risk)
identity = np.eye(G.shape[0])
exact = G @ identity
one_label = FisherMCLinearOperator(risk, mc_samples=1, seed=0) @ identity


def distance(matrix):
    """Relative distance from the Gauss-Newton matrix, in the Frobenius norm."""
    return np.linalg.norm(matrix - exact) / np.linalg.norm(exact)


print(f"one label for each wine: {distance(one_label):.1%} from the exact matrix")

# %%
# More labels
# -----------
#
# ``mc_samples`` says how many are drawn for each sample of the data.

for mc_samples in (1, 4, 16, 64):
    F = FisherMCLinearOperator(risk, mc_samples=mc_samples)
    print(f"{mc_samples:3d} labels: {distance(F @ identity):.1%}")

# %%
# One seed, one matrix
# --------------------
#
# A solver needs the same matrix in each product, so an operator draws its labels from a
# generator of its own. Two operators with one seed are the same matrix, whatever else draws
# random numbers meanwhile, on every device, and however the data is cut into batches.
# Another seed is another matrix.

again = FisherMCLinearOperator(risk, seed=0)
torch.rand(1000)
assert np.array_equal(again @ identity, one_label)
whole = FisherMCLinearOperator(model, loss_function, model.parameters(), [(X, y)], seed=0)
assert np.allclose(whole @ identity, one_label, atol=1e-12)
other = FisherMCLinearOperator(risk, seed=1) @ identity
print(f"seeds 0 and 1 differ by {np.linalg.norm(other - one_label):.3f}")

# %%
# Along the way
# -------------
#
# Means of independent matrices are Monte-Carlo estimates, too. So one label at a time
# is added, and the mean so far is kept at some points of the way.

counts = np.unique(np.geomspace(1, 300, 25).astype(int))
total, errors, snapshots = np.zeros_like(exact), [], {}
for seed in range(1, counts[-1] + 1):
    F = FisherMCLinearOperator(risk, seed=seed)
    total += F @ identity
    if seed in counts:
        errors.append(distance(total / seed))
    if seed in (1, 10, 300):
        snapshots[seed] = total / seed
assert errors[-1] < 0.15 < errors[0]

# %%
# On both logarithmic axes the errors follow a line of slope :math:`-1/2`: for a tenth
# of the error a hundred times the labels.

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
axis.loglog(counts, errors, "o-", label="one seed after another")
middle = len(counts) // 2
scale = errors[middle] * np.sqrt(counts[middle])
axis.loglog(counts, scale / np.sqrt(counts), "--", color="0.5", label=r"$1/\sqrt{M}$")
axis.set_xlabel("labels drawn for each wine")
axis.set_ylabel("relative error of the matrix")
axis.legend()

# %%
# Not the empirical Fisher
# ------------------------
#
# Taking the labels of the data in place of drawn ones costs no randomness, and gives
# another matrix. No number of samples makes up for that.

empirical = EFLinearOperator(risk) @ identity
print(f"empirical Fisher: {distance(empirical):.1%} from the exact matrix")

figure, axes = plt.subplots(ncols=5, figsize=(15, 3.4), layout="constrained")
shown = {
    "Gauss-Newton": exact,
    **{f"{count} label{'s'[: count > 1]}": a for count, a in snapshots.items()},
    "empirical Fisher": empirical,
}
for axis, (title, matrix) in zip(axes, shown.items(), strict=True):
    with np.errstate(divide="ignore"):
        image = axis.imshow(np.log10(np.abs(matrix)), vmin=-5, vmax=-1)
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
figure.colorbar(image, ax=axes, shrink=0.8, label="log10 of absolute values")
