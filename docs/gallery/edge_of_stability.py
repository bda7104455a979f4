r"""
Sharpness along training
========================

Gradient descent with step size :math:`\eta` diverges on a quadratic whose largest curvature
exceeds :math:`2/\eta`. On a neural network the largest eigenvalue of the Hessian, the
sharpness, rises during training until it has reached :math:`2/\eta`, and then stays about
there: the edge of stability (Cohen et al., 2021, https://openreview.net/forum?id=jh-rTtvkGeM).

To see it, the sharpness of every step is needed. A ``Tracker`` starts from the eigenvectors
of the step before, which takes two products a step on the way, and four where the weights
go back and forth.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import HessianLinearOperator, estimate

torch.manual_seed(0)
torch.set_num_threads(1)

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:500] / 16), torch.tensor(labels[:500])
targets = nn.functional.one_hot(y, 10).double()
loss_function = nn.MSELoss()

# %%
# Full-batch gradient descent, for two step sizes. The operator belongs to the model and
# follows it: after each step of the optimizer its next product is that of the new Hessian.


def train(step_size, num_steps):
    """Losses and sharpnesses of all steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=step_size)
    H = HessianLinearOperator(model, loss_function, model.parameters(), [(X, targets)])
    tracker = estimate.Tracker(H, rtol=0.01)
    losses = []
    for _ in range(num_steps):
        tracker.update()
        optimizer.zero_grad()
        loss = loss_function(model(X), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seen = tracker.history
    products = np.mean([step.num_matvecs for step in seen[1:]])
    (true,) = estimate.eigsh(H, 1, tol=1e-6).eigenvalues.tolist()
    final = tracker.update().eigenvalues[0]
    print(
        f"step size {step_size}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {products:.1f} "
        f"products a step; last sharpness {final:.4f}, by eigsh {true:.4f}, 2 / step size "
        f"{2 / step_size:.4f}"
    )
    assert abs(final - true) < 0.01 * true
    return losses, [step.eigenvalues[0] for step in seen[:num_steps]], products


runs = {step_size: train(step_size, 500) for step_size in (0.8, 1.0)}
assert all(products <= 5 for *_, products in runs.values())

# %%
# Dashed, the line at :math:`2/\eta`. The loss goes down all the same, not monotonically
# any more.

figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for colour, (step_size, (losses, sharpnesses, _)) in zip(
    ("C0", "C1"), runs.items(), strict=True
):
    axes[0].semilogy(losses, colour, label=f"step size {step_size:g}")
    axes[1].plot(sharpnesses, colour)
    axes[1].axhline(2 / step_size, color=colour, linestyle="--", linewidth=1)
axes[0].set_xlabel("step")
axes[0].set_ylabel("loss")
axes[0].legend()
axes[1].set_xlabel("step")
axes[1].set_ylabel("largest eigenvalue of the Hessian")
