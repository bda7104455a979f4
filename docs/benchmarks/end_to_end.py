"""Whole solves, from the construction of the operator to the answer, on the CPU.

SciPy's ``eigsh``, ``lobpcg`` and ``cg`` with NumPy vectors, torch with two threads, SciPy's
own BLAS limited by ``single_threaded_blas``. For each: the seconds inside of products (the
first one, recording and checks included), their number, and what they would take if each
took as long as a product alone, after all others. In one process, in turn with the peer
library; a table of medians is printed and written.

    python docs/benchmarks/end_to_end.py [--rounds 3] [--output end_to_end.md]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.sparse.linalg as spla
import torch
import torchlinop
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torchlinop import GGNLinearOperator, HessianLinearOperator

import problems

LOSS = nn.CrossEntropyLoss()


@dataclass
class Setting:
    """A model, its data in batches, and options of the operators."""

    name: str
    model: nn.Module
    data: list[tuple[Tensor, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    with_peer: bool = True

    def __post_init__(self) -> None:
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def operator(self, kind: type) -> Any:
        """A new operator."""
        return kind(self.model, LOSS, self.params, self.data, **self.options)

    def gradient(self) -> None:
        """Compute the gradient of the loss on all data."""
        for X, y in self.data:
            torch.autograd.grad(LOSS(self.model(X), y), self.params)


def settings() -> list[Setting]:
    """What is solved for."""
    found = []
    for name, make in {**problems.PROBLEMS, "LSTM": problems.lstm}.items():
        torch.manual_seed(0)
        model, X, y = make()
        found.append(Setting(name, model, [(X, y)], with_peer=name != "LSTM"))
        if name == "MLP":
            batches = list(zip(X.split(32), y.split(32), strict=True))
            found.append(Setting("MLP, 8 batches", model, batches, with_peer=False))
            found.append(Setting("MLP, no cache", model, [(X, y)], {"cache": False}, False))
    return found


# ----------------------------------------------------------------------- the solvers


def eigsh(A: LinearOperator) -> None:
    """Ten largest eigenvalues."""
    v0 = np.random.default_rng(0).standard_normal(A.shape[0]).astype(A.dtype)
    spla.eigsh(A, k=10, tol=1e-3, v0=v0)


def lobpcg(A: LinearOperator) -> None:
    """Eight largest eigenvalues, in blocks of eight vectors, 40 iterations at most."""
    X = np.random.default_rng(0).standard_normal((A.shape[0], 8)).astype(A.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not converge in so few
        spla.lobpcg(A, X, tol=1e-9, maxiter=40)


def cg(A: LinearOperator) -> None:
    """Solve with a damped matrix, to 1e-4."""
    b = np.random.default_rng(0).standard_normal(A.shape[0]).astype(A.dtype)
    shift = LinearOperator(A.shape, matvec=lambda v: A @ v + 1e-2 * v, dtype=A.dtype)
    spla.cg(shift, b, rtol=1e-4)


@dataclass
class Measured:
    """Seconds of a whole solve, of its products, and how many vectors were multiplied."""

    total: float
    inside: float
    columns: int


def solve(make: Callable[[], Any], solver: Callable, context: Callable) -> Measured:
    """Build an operator and run a solver on it."""
    with context():
        start = time.perf_counter()
        A = make()
        inside, columns = 0.0, 0

        def timed(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            nonlocal inside, columns
            begin = time.perf_counter()
            y = product(x)
            inside += time.perf_counter() - begin
            columns += 1 if x.ndim == 1 else x.shape[1]
            return y

        # the methods that every product passes through, one of them
        A._product = partial(timed, A._product)
        A._vector_product = partial(timed, A._vector_product)
        solver(A)
        return Measured(time.perf_counter() - start, inside, columns)


def peer_solve(setting: Setting, kind: str, solver: Callable, context: Callable) -> float:
    """Seconds of the same solve with curvlinops."""
    import curvlinops

    with context():
        start = time.perf_counter()
        A = getattr(curvlinops, kind)(
            setting.model, LOSS, setting.params, setting.data, check_deterministic=False
        ).to_scipy(dtype=np.float32)
        solver(A)
        return time.perf_counter() - start


def quiet(setting: Setting, kind: type, repeat: int = 15) -> float:
    """Seconds of one product with a NumPy vector once all is settled."""
    A = setting.operator(kind)
    rng = np.random.default_rng(0)
    vectors = [rng.random(A.shape[1]).astype(A.dtype) for _ in range(4)]
    deadline = time.perf_counter() + 2
    for i in range(80):  # recorded, or not
        A @ vectors[i % 4]
        if time.perf_counter() > deadline and i > 7:
            break
    times = []
    for i in range(repeat):
        start = time.perf_counter()
        A @ vectors[i % 4]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def median_time(function: Callable[[], object], repeat: int = 9) -> float:
    """Median of a few calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


RUNS = (
    ("eigsh, Hessian", HessianLinearOperator, eigsh),
    ("eigsh, GGN", GGNLinearOperator, eigsh),
    ("lobpcg, GGN", GGNLinearOperator, lobpcg),
    ("cg, GGN", GGNLinearOperator, cg),
)


def measure(setting: Setting, rounds: int, context: Callable) -> list[str]:
    """Return the rows of a setting."""
    rows = []
    setting.gradient()
    for label, kind, solver in RUNS:
        repeats = 1 if solver is lobpcg else rounds
        runs, peer, gradients, products = [], [], [], []
        for _ in range(repeats):
            gradients.append(median_time(setting.gradient))
            products.append(quiet(setting, kind))
            runs.append(solve(lambda kind=kind: setting.operator(kind), solver, context))
            if setting.with_peer and solver is eigsh:
                try:
                    peer.append(peer_solve(setting, kind.__name__, solver, context))
                except Exception as error:  # the cell stays empty
                    print(f"peer: {type(error).__name__}: {str(error)[:80]}")
        g, q = statistics.median(gradients), statistics.median(products)
        total = statistics.median(r.total for r in runs)
        inside = statistics.median(r.inside for r in runs)
        columns = round(statistics.median(r.columns for r in runs))
        over = statistics.median(
            (r.inside - 6 * a) / (r.columns * b)
            for r, a, b in zip(runs, gradients, products, strict=True)
        )
        faster = f"{statistics.median(peer) / total:.1f}" if peer else ""
        rows.append(
            f"| {setting.name} | {label} | {total:.3g} | {columns} | {inside:.3g} | "
            f"{1e3 * q:.3g} | {q / g:.2f} | {over:.2f} | {total - inside:.3g} | {faster} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--default-threads", action="store_true", help="BLAS as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message=".*is not a parameter.*")
    context: Callable[[], AbstractContextManager] = torchlinop.single_threaded_blas
    if arguments.default_threads:
        context = nullcontext
    rows = []
    for setting in settings():
        if arguments.only is None or setting.name in arguments.only:
            rows += measure(setting, arguments.rounds, context)

    import importlib.metadata as metadata

    try:
        peer = f"curvlinops-for-pytorch {metadata.version('curvlinops-for-pytorch')}"
    except metadata.PackageNotFoundError:
        peer = "the peer is not installed"
    table = [
        "# Whole solves",
        "",
        "Printed by `python docs/benchmarks/end_to_end.py` (`tox run -e benchmark` "
        "installs the peer library).",
        "",
        "| problem | solve | seconds | products | in products | quiet product, ms | in "
        "gradients | over quiet | solver's own | peer's time over ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "Seconds from the construction of the operator to the answer, with NumPy vectors, "
        "float32; products are columns multiplied. A quiet product is one alone, after all "
        "others. *Over quiet*: the seconds in products, without six gradients, over the "
        f"number of products times the quiet one. Medians of {arguments.rounds} runs "
        "(lobpcg: one). CPU, torch with 2 threads, the solvers' BLAS "
        + ("as it is." if arguments.default_threads else "in `single_threaded_blas()`."),
        "",
        f"torchlinop {torchlinop.__version__}, torch {torch.__version__}, NumPy "
        f"{np.__version__}, SciPy {scipy.__version__}, Python "
        f"{platform.python_version()}, {peer}; {time.strftime('%Y-%m-%d')}.",
    ]
    text = "\n".join(table) + "\n"
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
