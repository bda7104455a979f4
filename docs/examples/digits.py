"""The curvature of a classifier of handwritten digits, by SciPy's own solvers.

Trains a small network on scikit-learn's digits, hands its Hessian, Gauss-Newton matrix and
Jacobian to eigsh, lobpcg, cg, minres and svds as they are, prints what they found and what
it cost, and draws the spectrum. With a GPU and CuPy the same objects go into
cupyx.scipy.sparse.linalg as well.

    python docs/examples/digits.py [--output spectrum.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg as spla
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    TorchLinearOperator,
    gradient_and_loss,
    single_threaded_blas,
)

DTYPE = torch.float64
#: uneven on purpose: the operators are those of all data, however it is cut
BATCHES = [600, 500, 400]
DAMPING = 1e-2


class Counted(TorchLinearOperator):
    """An operator that counts the vectors it multiplies."""

    def __init__(
        self, operator: TorchLinearOperator, counts: list[int] | None = None
    ) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self.operator = operator
        self.counts = [0] if counts is None else counts

    def _apply(self, x: Tensor) -> Tensor:
        self.counts[0] += x.shape[1]
        return self.operator @ x

    def _adjoint(self) -> TorchLinearOperator:
        adjoint = self.operator.adjoint()
        return self if adjoint is self.operator else Counted(adjoint, self.counts)


@dataclass
class Row:
    """One line of the table."""

    task: str
    answer: str
    residual: float
    products: int
    seconds: float
    in_gradients: float


def train() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Fit a 64-32-10 network to 1,500 digits by L-BFGS; stop before it knows them all."""
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


class Study:
    """Runs solvers on one device and collects the table."""

    def __init__(self, model: nn.Module, data: list, device: str) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.data = [(X.to(self.device), y.to(self.device)) for X, y in data]
        self.loss = nn.CrossEntropyLoss()
        self.params = list(model.parameters())
        arguments = (self.model, self.loss, self.params, self.data)
        self.H = HessianLinearOperator(*arguments)
        self.G = GGNLinearOperator(*arguments)
        self.J = JacobianLinearOperator(self.model, self.params, self.data[-1:])
        n = self.H.shape[0]
        self.damping = DAMPING * IdentityLinearOperator([(n,)], self.device, DTYPE)
        gradient, _ = gradient_and_loss(*arguments)
        self.gradient = self.H.space.to_vector(gradient)
        self.gradient_seconds = self._time_gradient()
        self.rows: list[Row] = []

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _time_gradient(self) -> float:
        """Median seconds of a gradient of the loss on all data."""
        seconds = []
        for _ in range(11):
            self._synchronize()
            start = time.perf_counter()
            for X, y in self.data:
                torch.autograd.grad(self.loss(self.model(X), y), self.params)
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[5]

    def run(
        self,
        task: str,
        operator: TorchLinearOperator,
        solve: Callable[[TorchLinearOperator], Any],
        residual: Callable[[Any], float],
        describe: Callable[[Any], str],
    ) -> Any:
        """Solve, check the answer with products of the operator, add a row."""
        counted = Counted(operator)
        self._synchronize()
        start = time.perf_counter()
        answer = solve(counted)
        self._synchronize()
        seconds = time.perf_counter() - start
        products = counted.counts[0]
        in_gradients = seconds / max(products, 1) / self.gradient_seconds
        self.rows.append(
            Row(task, describe(answer), residual(answer), products, seconds, in_gradients)
        )
        return answer

    def print_table(self, title: str) -> None:
        """Print what the solvers found."""
        print(f"\n{title}; one gradient takes {self.gradient_seconds * 1e3:.2f} ms\n")
        header = "answer", "residual", "products", "seconds", "gradients"
        print(f"{'solver':31}{header[0]:41}{header[1]:>9}{header[2]:>10}", end="")
        print(f"{header[3]:>9}{header[4]:>11}")
        for row in self.rows:
            print(
                f"{row.task:31}{row.answer:41}{row.residual:9.1e}{row.products:10d}"
                f"{row.seconds:9.2f}{row.in_gradients:11.2f}"
            )
        print(
            "residual: largest ||A v - lambda v|| / |lambda|_max or ||A x - b|| / ||b||, "
            "computed with the operator;\ngradients: seconds per product over seconds "
            "per gradient, the solver's own work included"
        )


def pair_residual(operator: TorchLinearOperator) -> Callable[[Any], float]:
    """Largest residual of eigenpairs relative to the largest eigenvalue."""

    def residual(pairs: Any) -> float:
        values, vectors = pairs
        defect = operator @ vectors - vectors * values
        return float(((defect**2).sum(0) ** 0.5).max() / abs(values).max())

    return residual


def solve_residual(operator: TorchLinearOperator, b: Any) -> Callable[[Any], float]:
    """Relative residual of a solution."""

    def residual(solution: Any) -> float:
        defect = operator @ solution[0] - b
        return float(((defect**2).sum() / (b**2).sum()) ** 0.5)

    return residual


def listing(values: Any, count: int = 4) -> str:
    """The leading values, largest first."""
    ordered = sorted((float(v) for v in values), reverse=True)
    return " ".join(f"{v:.4g}" for v in ordered[:count])


def with_scipy(study: Study) -> dict[str, Any]:
    """SciPy's solvers; NumPy vectors in and out, whatever the device."""
    H, G, J, n = study.H, study.G, study.J, study.H.shape[0]
    g = study.gradient.cpu().numpy()
    damped_G, damped_H = G + study.damping, H + study.damping
    start = np.random.default_rng(0).standard_normal((n, 14))
    found = {}
    for name, A in (("Hessian", H), ("GGN", G)):
        found[name] = study.run(
            f"eigsh {name}, k=12, LA",
            A,
            lambda A: spla.eigsh(A, k=12, which="LA", v0=start[:, 0]),
            pair_residual(A),
            lambda pairs: listing(pairs[0]),
        )
    found["lowest"] = study.run(
        "eigsh Hessian, k=3, SA",
        H,
        lambda A: spla.eigsh(A, k=3, which="SA", v0=start[:, 0], tol=1e-8),
        pair_residual(H),
        lambda pairs: listing(pairs[0]),
    )
    study.run(
        "lobpcg GGN, 14 vectors",
        G,
        lambda A: spla.lobpcg(A, start, tol=1e-7, maxiter=60),
        lambda pairs: pair_residual(G)((pairs[0][:9], pairs[1][:, :9])),
        lambda pairs: listing(pairs[0]),
    )
    found["step"] = study.run(
        f"cg GGN + {DAMPING:g}",
        damped_G,
        lambda A: spla.cg(A, g, maxiter=2000),
        solve_residual(damped_G, g),
        lambda s: f"natural gradient of length {np.linalg.norm(s[0]):.4g}",
    )
    study.run(
        f"minres Hessian + {DAMPING:g}",
        damped_H,
        lambda A: spla.minres(A, g, rtol=1e-8, maxiter=4000),
        solve_residual(damped_H, g),
        lambda s: f"Newton step of length {np.linalg.norm(s[0]):.4g}",
    )
    study.run(
        f"svds Jacobian {J.shape[0]} x {J.shape[1]}",
        J,
        lambda A: spla.svds(A, k=5, v0=start[:, 0]),
        lambda usv: float(
            np.linalg.norm(J @ usv[2].T - usv[0] * usv[1], axis=0).max() / usv[1].max()
        ),
        lambda usv: listing(usv[1]),
    )
    study.print_table(f"SciPy on {study.device}")
    return found


def with_cupyx(study: Study) -> None:
    """Cupyx's solvers on the same operators; nothing leaves the GPU."""
    import cupy
    import cupyx.scipy.sparse.linalg as cusp

    study.rows = []
    H, G, J, n = study.H, study.G, study.J, study.H.shape[0]
    g = cupy.from_dlpack(study.gradient)
    damped_G, damped_H = G + study.damping, H + study.damping
    start = cupy.random.default_rng(0).standard_normal((n, 14))
    for name, A in (("Hessian", H), ("GGN", G)):
        study.run(
            f"cupyx eigsh {name}, k=12, LA",
            A,
            lambda A: cusp.eigsh(A, k=12, which="LA"),
            pair_residual(A),
            lambda pairs: listing(pairs[0]),
        )
    study.run(
        "cupyx lobpcg GGN",
        G,
        lambda A: cusp.lobpcg(A, start, tol=1e-7, maxiter=60),
        pair_residual(G),
        lambda pairs: listing(pairs[0]),
    )
    study.run(
        "cupyx cg GGN",
        damped_G,
        lambda A: cusp.cg(A, g, maxiter=2000),
        solve_residual(damped_G, g),
        lambda s: f"natural gradient of length {float(cupy.linalg.norm(s[0])):.4g}",
    )
    study.run(
        "cupyx minres Hessian",
        damped_H,
        lambda A: cusp.minres(A, g, tol=1e-8, maxiter=4000),
        solve_residual(damped_H, g),
        lambda s: f"Newton step of length {float(cupy.linalg.norm(s[0])):.4g}",
    )
    study.run(
        "cupyx svds Jacobian",
        J,
        lambda A: cusp.svds(A, k=5),
        lambda usv: float(
            (cupy.linalg.norm(J @ usv[2].T - usv[0] * usv[1], axis=0).max()) / usv[1].max()
        ),
        lambda usv: listing(usv[1]),
    )
    study.print_table("cupyx, the same operators")


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

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, values), colour in zip(spectra.items(), ("C0", "C1"), strict=True):
        positive = values[values > 0][::-1]
        axes.loglog(np.arange(1, len(positive) + 1), positive, colour, label=name)
        negative = -values[values < 0]
        if name == "Hessian":
            axes.loglog(
                np.arange(1, len(negative) + 1),
                negative,
                colour,
                linestyle=":",
                label="Hessian, negative (absolute value)",
            )
    axes.set_ylim(spectra["GGN"][-1] * 1e-10, spectra["GGN"][-1] * 4)
    axes.set_xlabel("index")
    axes.set_ylabel("eigenvalue")
    axes.set_title("Curvature of a digits classifier at the end of training")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\nspectrum drawn in {path}")


def main() -> None:
    """Train, solve, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="spectrum.png", help="name of the picture")
    arguments = parser.parse_args()
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
    draw(spectra, arguments.output)


if __name__ == "__main__":
    main()
