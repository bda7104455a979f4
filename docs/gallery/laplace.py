r"""
How sure is a classifier?
=========================

A trained network gives one set of parameters; there are others that fit the data nearly as
well. The Laplace approximation says which: a normal distribution around the trained ones,
whose precision is the curvature of the log-likelihood plus that of the prior. From it come
samples of parameters, the variance of each prediction, and the marginal likelihood, by
which priors can be compared without other data.

The data are scikit-learn's handwritten digits: the first 800 to train on; of the others,
which have been written by other people, a third to choose by and two thirds held out; and
the held-out digits turned step by step, which the network has never seen.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import (
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    laplace,
)

torch.set_num_threads(1)

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images / 16), torch.tensor(labels)
others = np.arange(800, len(X))
parts = np.arange(800), others[others % 3 == 0], others[others % 3 != 0]
train, chosen, test = ((X[part], y[part]) for part in parts)

# %%
# A network that is too sure of itself
# ------------------------------------
#
# 1,210 parameters, trained to the end with hardly any weight decay. The decay is the prior:
# :math:`\frac\delta2 |\theta|^2` beside the summed loss is a normal distribution with
# precision :math:`\delta`.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
decay = 0.01
optimizer = torch.optim.LBFGS(
    model.parameters(), max_iter=300, line_search_fn="strong_wolfe"
)


def objective():
    """Summed loss with weight decay, and its gradient."""
    optimizer.zero_grad()
    squares = sum(p.square().sum() for p in model.parameters())
    loss = nn.functional.cross_entropy(model(train[0]), train[1], reduction="sum")
    loss = loss + 0.5 * decay * squares
    loss.backward()
    return loss


optimizer.step(objective)


def scores(probabilities, y):
    """Negative log-likelihood, and how far confidence is from accuracy (15 bins)."""
    confidence, prediction = probabilities.max(1)
    nll = -probabilities[range(len(y)), y].log().mean().item()
    excess = (confidence - (prediction == y).double()).numpy()
    bins = np.digitize(confidence.numpy(), np.linspace(0, 1, 16)[1:-1])
    error = sum(abs(excess[bins == b].sum()) for b in range(15)) / len(y)
    return nll, error


with torch.no_grad():
    alone = model(test[0]).softmax(1)
accuracy = (alone.argmax(1) == test[1]).double().mean().item()
alone_nll, alone_error = scores(alone, test[1])
print(f"held out: {accuracy:.1%} right, NLL {alone_nll:.3f}, ECE {alone_error:.3f}")

# %%
# Its posterior
# -------------
#
# ``laplace`` takes the risk and any curvature of it. KFAC needs one eigendecomposition for
# each factor, which serves every prior, so a scan over the prior precision costs little.
# The marginal likelihood asks which prior makes the training data probable, if the
# parameters are left as they are.

risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), model.parameters(), [train])
posterior = laplace(risk, KFACLinearOperator(risk), prior_precision=decay)
by_evidence = posterior.tuned()
print(f"prior precision {decay}: evidence {posterior.log_marginal_likelihood():.1f}")
print(
    f"prior precision {by_evidence.prior_precision:.3f}: evidence "
    f"{by_evidence.log_marginal_likelihood():.1f}; the data determines "
    f"{by_evidence.effective_dimension():.0f} of {len(posterior.mean)} parameters"
)

precisions = np.logspace(-2, 3, 11)
evidence, losses = [], []
for delta in precisions:
    candidate = posterior.with_parameters(prior_precision=delta)
    evidence.append(candidate.log_marginal_likelihood())
    losses.append(scores(candidate.predictive(chosen[0]).probit(), chosen[1])[0])
best = precisions[np.argmin(losses)]
by_choice = posterior.with_parameters(prior_precision=best)
print(f"prior precision {best:.1f}: least loss on the digits to choose by")

# %%
# The two disagree, and both have a point. The evidence wants a wide posterior: all the
# parameters that these 800 digits leave open. So wide a posterior is right about digits of
# another kind, and too modest about those of the same kind, where the linearized network
# exaggerates what moving so far would change. A prior that was chosen on digits of the same
# kind cannot do worse than the network alone there: without any variance it is that.
#
# Samples are parameters like any others. As networks they are worse than the mean: that far
# from it a network is not the linear model to which the curvature belongs. This is why
# predictions are made with the linearized model.

drawn = by_choice.sample(5, seed=0)
with torch.no_grad():
    for sample in drawn:
        logits = torch.func.functional_call(
            model, by_choice.space.to_named(sample), (test[0],)
        )
        right = (logits.argmax(1) == test[1]).double().mean().item()
        print(f"a sampled network: {right:.1%} right")

# %%
# Held-out digits
# ---------------
#
# Probabilities come from the logits' variances (``probit``) or from drawn logits
# (``monte_carlo``). Besides KFAC: the diagonal, and the last layer alone with its whole
# Gauss-Newton matrix, where the model is linear in its parameters. Each has its own prior.


def chosen_prior(posterior):
    """The posterior with the least loss on the digits to choose by."""
    return min(
        (posterior.with_parameters(prior_precision=d) for d in np.logspace(-1, 3, 9)),
        key=lambda p: scores(p.predictive(chosen[0]).probit(), chosen[1])[0],
    )


head = EmpiricalRisk(model, nn.CrossEntropyLoss(), model[-1].parameters(), [train])
posteriors = {
    "KFAC, by evidence": by_evidence,
    "KFAC": by_choice,
    "diagonal": chosen_prior(laplace(risk, GGNDiagonalLinearOperator(risk))),
    "last layer": chosen_prior(laplace(head, GGNLinearOperator(head))),
}
print(f"{'':20}precision    NLL    ECE | Monte Carlo")
print(f"{'network alone':20}{'':9}{alone_nll:7.3f}{alone_error:7.3f}")
held_out = {}
for name, posterior in posteriors.items():
    predictive = posterior.predictive(test[0])
    held_out[name] = scores(predictive.probit(), test[1])
    drawn = scores(predictive.monte_carlo(200), test[1])
    print(
        f"{name:20}{posterior.prior_precision:9.2f}{held_out[name][0]:7.3f}"
        f"{held_out[name][1]:7.3f} |{drawn[0]:6.3f}{drawn[1]:7.3f}"
    )
for name in ("KFAC", "diagonal", "last layer"):
    assert held_out[name][0] < alone_nll
assert held_out["KFAC"][1] < alone_error

# %%
# Turned digits
# -------------
#
# Turned by 45 degrees, the confidence of the network alone exceeds its accuracy by two
# thirds. All posteriors know better: most of all the widest one, whose price was paid
# above.

angles = range(0, 61, 15)
curves = {name: [] for name in ("network alone", *posteriors)}
for angle in angles:
    turned = rotate(
        test[0].numpy().reshape(-1, 8, 8), angle, axes=(2, 1), reshape=False, order=1
    )
    turned = torch.from_numpy(turned.reshape(-1, 64))
    with torch.no_grad():
        curves["network alone"].append(scores(model(turned).softmax(1), test[1]))
    for name, posterior in posteriors.items():
        predicted = posterior.predictive(turned).probit()
        curves[name].append(scores(predicted, test[1]))
for name, values in curves.items():
    print(f"{name:20}", " ".join(f"{nll:6.2f}" for nll, _ in values))
for name in posteriors:
    assert curves[name][3][0] < 0.9 * curves["network alone"][3][0]

figure, axes = plt.subplots(ncols=3, figsize=(13, 4), layout="constrained")
axes[0].semilogx(precisions, evidence, marker=".")
axes[0].axvline(by_evidence.prior_precision, linestyle=":", color="C0")
axes[0].set_ylim(min(evidence[0], max(evidence) - 1000), max(evidence) + 50)
axes[0].set_xlabel("prior precision")
axes[0].set_ylabel("log marginal likelihood")
other = axes[0].twinx()
other.semilogx(precisions, losses, color="C1", linestyle="--", marker="x")
other.axvline(best, linestyle=":", color="C1")
other.set_ylabel("NLL of other digits (dashed)")
styles = zip(curves.items(), "o^sDv", ("-", "--", "-", ":", "-."), strict=True)
for (name, values), marker, line in styles:
    for axis, column in ((axes[1], 0), (axes[2], 1)):
        shown = [value[column] for value in values]
        axis.plot(angles, shown, marker=marker, linestyle=line, label=name)
axes[1].set_yscale("log")
axes[1].set_ylabel("NLL of the held-out digits")
axes[2].set_ylabel("expected calibration error")
axes[1].legend(fontsize="small")
for axis in axes[1:]:
    axis.set_xlabel("turned by (degrees)")
    axis.set_xticks(angles)
