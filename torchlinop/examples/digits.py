"""The curvature of a classifier of handwritten digits, by SciPy's own solvers.

Trains a small network on scikit-learn's digits, hands its Hessian, Gauss-Newton matrix and
Jacobian to eigsh, lobpcg, cg, minres and svds as they are, prints what they found and what
it cost, and draws the spectrum. With a GPU and CuPy the same objects go into
cupyx.scipy.sparse.linalg as well.

    python -m torchlinop demo [--output spectrum.png]
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchlinop import gradient_and_loss, plot, single_threaded_blas, summary
from torchlinop.examples.solvers import DTYPE, Study, with_cupyx, with_scipy

#: uneven on purpose: the operators are those of all data, however it is cut
BATCHES = [600, 500, 400]


def train() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Fit a 64-32-10 network to 1,500 digits by L-BFGS; stop before it knows them all."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    X = torch.tensor(digits.data / 16, dtype=DTYPE)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(DTYPE)
    X_train, y_train, rest = X[:1500], y[:1500], (X[1500:], y[1500:])
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(X_train), y_train)
        value.backward()
        return value

    optimizer.step(closure)
    return (
        model,
        list(zip(X_train.split(BATCHES), y_train.split(BATCHES), strict=True)),
        rest,
    )


def lessons(found: dict[str, Any], spectra: dict[str, np.ndarray]) -> None:
    """Say what the numbers mean."""
    hessian, ggn = spectra["Hessian"], spectra["GGN"]
    order = {k: np.argsort(found[k][0])[::-1] for k in ("Hessian", "GGN")}
    overlap = np.linalg.norm(
        found["Hessian"][1][:, order["Hessian"][:9]].T
        @ found["GGN"][1][:, order["GGN"][:9]]
    )
    error = max(
        np.abs(np.sort(found[k][0])[::-1] - spectra[k][::-1][:12]).max() / spectra[k][-1]
        for k in ("Hessian", "GGN")
    )
    gap = "a gap" if ggn[-9] > 2 * ggn[-10] else "no gap"
    negative = int((hessian < -1e-6 * hessian[-1]).sum())
    print("\nWhat this says about the network\n")
    print(
        f"- Few directions carry the curvature: nine of {len(ggn)} GGN eigenvalues, one "
        f"fewer than classes, make up {ggn[-9:].sum() / ggn.sum():.0%} of its trace. There "
        f"is {gap} behind them: the ninth is {ggn[-9] / ggn[-10]:.2f} times the tenth.\n"
        f"- In those nine directions the Hessian and the GGN agree: their leading "
        f"nine-dimensional eigenspaces overlap to {overlap**2 / 9:.1%}.\n"
        f"- Training did not end in a strict minimum: {negative} of {len(hessian)} "
        f"eigenvalues of the Hessian are negative (below 1e-6 of the largest), the lowest "
        f"{hessian[0]:.3g} against {hessian[-1]:.3g} at the top.\n"
        f"- Most directions are flat: {int((ggn < 1e-6 * ggn[-1]).sum())} eigenvalues of "
        f"the GGN are below 1e-6 of the largest.\n"
        f"- The eigenvalues found by eigsh and those of the dense matrices differ by "
        f"{error:.1e} of the largest."
    )


def draw(spectra: dict[str, np.ndarray], path: str) -> None:
    """Draw the eigenvalues of both matrices, ordered, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, values in spectra.items():
        plot.eigenvalues(values, ax=ax, label=name)
    ax.set_title("Curvature of a digits classifier at the end of training")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nspectrum drawn in {path}")


def main(output: str = "spectrum.png") -> None:
    """Train, solve, print, draw into the file ``output``."""
    for package, name in (("sklearn", "scikit-learn"), ("matplotlib", "Matplotlib")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"The demo needs {name}: pip install 'torchlinop[demo]'.")
    torch.manual_seed(0)
    model, data, (X, y) = train()
    count = sum(p.numel() for p in model.parameters())
    accuracy = (model(X).argmax(-1) == y).double().mean().item()
    study = Study(model, data, "cuda" if torch.cuda.is_available() else "cpu")
    _, loss = gradient_and_loss(model, study.loss, study.params, study.data)
    print(
        f"64-32-10 network, {count} parameters, 1500 digits in batches of {BATCHES}: "
        f"training loss {loss.item():.4f}, gradient norm "
        f"{study.gradient.norm().item():.1e}, "
        f"accuracy on 297 unseen digits {accuracy:.1%}"
    )
    with single_threaded_blas():  # else its threads wait for work on torch's cores
        found = with_scipy(study)
    if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
        with_cupyx(study)
    spectra = {
        name: np.linalg.eigvalsh(A.to_dense().cpu().numpy())
        for name, A in (("Hessian", study.H), ("GGN", study.G))
    }
    lessons(found, spectra)
    print("\nThe same of any model, without a dense matrix (torchlinop.summary)\n")
    print(summary(study.H))
    draw(spectra, output)
