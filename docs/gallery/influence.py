r"""
Which training samples made it so?
==================================

How would a model be if a training sample had been left out? To first order its parameters
move by :math:`A^{-1} \nabla L_n`, with the Hessian :math:`A` of what was minimized, so the
loss of a test sample ``m`` changes by :math:`\nabla L_m \cdot A^{-1} \nabla L_n`: the
influence of one on the other. It takes gradients of single samples and an inverse, which is
an operator.

First a model for which the truth can be had, logistic regression on scikit-learn's breast
cancer data, trained anew without each sample; then a network on handwritten digits, some of
which have wrong labels.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    HessianLinearOperator,
    influence,
    self_influence,
)

torch.set_num_threads(1)

# %%
# Training anew without each sample
# ---------------------------------
#
# 300 tumours to train on, 269 to test, 30 measurements each. The loss with its weight decay
# is convex, and Newton steps find its minimum to rounding, 301 times.

measured, benign = load_breast_cancer(return_X_y=True)
X = torch.tensor((measured - measured.mean(0)) / measured.std(0))
y = torch.tensor(benign[:, None], dtype=torch.float64)
X_train, y_train, X_test, y_test = X[:300], y[:300], X[300:], y[300:]
decay = 0.05


def trained(weights):
    """Parameters that minimize the weighted loss: 30 weights and a bias."""
    A = torch.cat([X_train, torch.ones(300, 1, dtype=X.dtype)], dim=1)
    theta = torch.zeros(31, 1, dtype=X.dtype)
    for _ in range(12):
        p = (A @ theta).sigmoid()
        gradient = A.T @ (weights * (p - y_train)) / 300 + decay * theta
        hessian = A.T @ (weights * p * (1 - p) * A) / 300
        theta -= torch.linalg.solve(
            hessian + decay * torch.eye(31, dtype=X.dtype), gradient
        )
    assert gradient.abs().max() < 1e-12
    return theta[:, 0]


def test_loss(theta):
    """Mean loss on the test data."""
    logits = X_test @ theta[:30] + theta[30]
    return nn.functional.binary_cross_entropy_with_logits(logits, y_test[:, 0]).item()


everything = torch.ones(300, 1, dtype=X.dtype)
theta = trained(everything)
retrained = []
for n in range(300):
    weights = everything.clone()
    weights[n] = 0
    retrained.append(test_loss(trained(weights)) - test_loss(theta))
retrained = np.array(retrained)

# %%
# Predicted without training
# --------------------------
#
# ``influence`` has a row for each training sample and a column for each test sample; the
# sum over the columns is about the whole test risk. The exact inverse is by conjugate
# gradients, all right-hand sides in one Krylov space; EKFAC's is made of two small
# eigendecompositions.

model = nn.Linear(30, 1).double()
with torch.no_grad():
    model.weight.copy_(theta[None, :30])
    model.bias.copy_(theta[30:])
parts = model, nn.BCEWithLogitsLoss(), list(model.parameters())
train = EmpiricalRisk(*parts, [(X_train, y_train)])
test = EmpiricalRisk(*parts, [(X_test, y_test)])

exact = CGInverseLinearOperator(HessianLinearOperator(train), damping=decay, rtol=1e-8)
approximate = EKFACLinearOperator(train).inverse(damping=decay)
predicted = {
    name: influence(inverse, train, test).sum(1).numpy()
    for name, inverse in (("exact Hessian", exact), ("EKFAC", approximate))
}
for name, scores in predicted.items():
    correlation = np.corrcoef(scores, retrained)[0, 1]
    slope = scores @ retrained / (scores @ scores)
    print(f"{name}: correlation {correlation:.4f}, slope {slope:.3f}")
    assert correlation > (0.99 if name == "exact Hessian" else 0.95)

# %%
# What the exact inverse leaves is the second order: without a sample the Hessian is another
# one, too, so that samples of much weight move the parameters farther than predicted.
#
# Wrong labels
# ------------
#
# Now a network, 1,000 digits, and every twentieth label wrong. No retraining would tell
# much here, since a network does not find the same minimum twice. But a wrong label is one
# that nothing else supports: the network has it from this sample alone, and without it
# would be surprised. That is the influence of a sample on its own loss. (The loss itself is
# nearly as good a guide here, since half of the wrong labels were not even learned.)

images, digits = load_digits(return_X_y=True)
X, y = torch.tensor(images[:1000] / 16), torch.tensor(digits[:1000])
rng = np.random.default_rng(0)
wrong = np.zeros(1000, dtype=bool)
wrong[rng.choice(1000, 50, replace=False)] = True
y[wrong] = (y[wrong] + torch.from_numpy(rng.integers(1, 10, 50))) % 10

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
loss_function, damping = nn.CrossEntropyLoss(), 1e-3
optimizer = torch.optim.LBFGS(
    network.parameters(), max_iter=200, line_search_fn="strong_wolfe"
)


def objective():
    """Mean loss with weight decay, and its gradient."""
    optimizer.zero_grad()
    squares = sum(p.square().sum() for p in network.parameters())
    loss = loss_function(network(X), y) + 0.5 * damping * squares
    loss.backward()
    return loss


optimizer.step(objective)
with torch.no_grad():
    fitted = (network(X).argmax(1) == y).numpy()
    losses = nn.functional.cross_entropy(network(X), y, reduction="none").numpy()
print(f"{fitted[wrong].sum()} of 50 wrong labels are fitted, {fitted.mean():.1%} of all")

digits_risk = EmpiricalRisk(network, loss_function, network.parameters(), [(X, y)])
inverse = EKFACLinearOperator(digits_risk).inverse(damping=damping)
own = self_influence(inverse, digits_risk).numpy()
found = {
    "self-influence": wrong[np.argsort(-own)].cumsum(),
    "loss": wrong[np.argsort(-losses)].cumsum(),
}
for name, hits in found.items():
    print(f"of the 50 with the largest {name}, {hits[49]} are wrong; of 100, {hits[99]}")

# %%
# Who taught it that?
# -------------------
#
# For one test digit that is misread, the training digits whose absence would help it most:
# the column of the influences with its loss.

others = torch.tensor(images[1000:] / 16), torch.tensor(digits[1000:])
with torch.no_grad():
    answers = network(others[0]).softmax(1)
misread = (answers.argmax(1) != others[1]).nonzero()[:, 0]
shown = misread[answers[misread].amax(1).argmax()].item()
one = [(others[0][shown : shown + 1], others[1][shown : shown + 1])]
question = EmpiricalRisk(network, loss_function, network.parameters(), one)
harmful = influence(inverse, digits_risk, question)[:, 0].argsort()[:4].tolist()

figure = plt.figure(figsize=(12, 4), layout="constrained")
left, middle, right = figure.subfigures(ncols=3, width_ratios=(1, 1, 1))
axis = left.subplots()
for (name, scores), marker in zip(predicted.items(), "ox", strict=True):
    axis.plot(1e3 * scores, 1e3 * retrained, marker, markersize=4, label=name)
axis.axline((0, 0), slope=1, color="0.5", linewidth=1)
axis.set_xlabel("predicted change of the test loss (1e-3)")
axis.set_ylabel("change by training anew (1e-3)")
axis.legend()
axis = middle.subplots()
for (name, hits), line in zip(found.items(), ("-", "--"), strict=True):
    axis.plot(np.arange(1, 151), hits[:150], line, label=f"by {name}")
axis.plot(np.arange(1, 151), np.arange(1, 151) / 20, ":", label="at random")
axis.set_xlabel("labels that are looked at")
axis.set_ylabel("wrong ones among them")
axis.legend()
axes = right.subplots(2, 3).ravel()
axes[0].imshow(others[0][shown].reshape(8, 8).numpy(), cmap="gray")
axes[0].set_title(f"a {others[1][shown]}, read as {answers[shown].argmax()}", fontsize=9)
axes[1].axis("off")
axes[1].text(0, 0.5, "because of\nthese, labelled\nas they are:", va="center", fontsize=9)
for axis, n in zip(axes[2:], harmful, strict=True):
    axis.imshow(X[n].reshape(8, 8).numpy(), cmap="gray")
    axis.set_title(f"{y[n]}" + (" (wrong)" if wrong[n] else ""), fontsize=9)
for axis in axes:
    axis.set_xticks([])
    axis.set_yticks([])
