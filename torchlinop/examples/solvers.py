"""SciPy's and cupyx's solvers on the matrices of one model, in a table."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg as spla
import torch
from torch import nn

from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    TorchLinearOperator,
    gradient_and_loss,
    monitor,
)

DTYPE = torch.float64
DAMPING = 1e-2


def _tolerance(solver: Callable, rtol: float) -> dict[str, float]:
    """The relative tolerance by the name that this version of SciPy has for it."""
    known = inspect.signature(solver).parameters
    return {"rtol" if "rtol" in known else "tol": rtol}


@dataclass
class Row:
    """One line of the table."""

    task: str
    answer: str
    residual: float
    products: int
    seconds: float
    in_gradients: float


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
        self._synchronize()
        start = time.perf_counter()
        with monitor(operator, max_vectors=0) as log:
            answer = solve(operator)
        self._synchronize()
        seconds = time.perf_counter() - start
        products = log.num_columns
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
        lambda A: spla.cg(A, g, maxiter=2000, atol=0.0),
        solve_residual(damped_G, g),
        lambda s: f"natural gradient of length {np.linalg.norm(s[0]):.4g}",
    )
    study.run(
        f"minres Hessian + {DAMPING:g}",
        damped_H,
        lambda A: spla.minres(A, g, **_tolerance(spla.minres, 1e-8), maxiter=4000),
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
