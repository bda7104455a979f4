"""Estimators, spectral densities and eigensolvers, against SciPy and the peer library.

Everything runs in one process, interleaved, on the CPU; tables of medians are printed
and written.

    python docs/benchmarks/estimators.py [--output docs/benchmarks/estimators.md]

Rows can be measured one after another, each in a process of its own: with --rows FILE they
are added to those that are in the file, and the tables have them all. Without problems
(--only densities --problems) nothing is measured and the tables are printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import torchlinop
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torchlinop import GGNLinearOperator, HessianLinearOperator, estimate
from torchlinop.examples import digits

import problems

#: eigenpairs, and the tolerance that SciPy is given
PAIRS, TOLERANCE = 10, 1e-4
PROBES, STEPS = 5, 50
SEEDS = 20
METHODS = ["hutchinson", "hutch++", "xtrace", "xnystrace"]


class Counted(torchlinop.TorchLinearOperator):
    """An operator that counts the vectors it multiplies."""

    def __init__(self, operator: torchlinop.TorchLinearOperator) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self.operator, self.columns = operator, 0

    def _apply(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.operator @ x

    def _adjoint(self) -> torchlinop.TorchLinearOperator:
        return self


def timed(function: Callable[[], Any]) -> tuple[float, Any, int]:
    """Seconds, the answer, and how often it was found.

    What is short runs ten times, of which the last five count: threads of NumPy's and
    torch's libraries wait actively for a while, which slows down whatever comes next.
    """
    seconds: list[float] = []
    while not seconds or (sum(seconds) < 0.5 and len(seconds) < 10):
        start = time.perf_counter()
        answer = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[len(seconds) // 2 :]), answer, len(seconds)


def traces(methods: list[str]) -> list[str]:
    """Products for one per cent of the digits GGN's trace."""
    torch.manual_seed(0)
    model, data, _ = digits.train()
    params = list(model.parameters())
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    dense = G.to_dense()
    A, truth = torchlinop.aslinearoperator(dense), dense.trace().item()
    lines = []
    for method in methods:
        products = None
        for count in (9, 12, 18, 24, 30, 36, 48, 60, 78, 99, 120, 150, 201, 300, 402, 600):
            errors = [
                estimate.trace(A, method=method, num_matvecs=count, seed=seed).value / truth
                - 1
                for seed in range(SEEDS)
            ]
            error = math.sqrt(statistics.fmean(e**2 for e in errors))
            if error <= 0.01:
                products = count
                break
        stopped = [
            estimate.trace(A, method=method, rtol=0.01, seed=seed) for seed in range(SEEDS)
        ]
        spent = statistics.median(t.num_matvecs for t in stopped)
        reached = math.sqrt(statistics.fmean((t.value / truth - 1) ** 2 for t in stopped))
        lines.append(
            f"| {method} | {products or 'over 600'} | {error:.2%} | {spent:g} | "
            f"{reached:.2%} |"
        )
        print(lines[-1], flush=True)
    return lines


def density(name: str, rounds: int) -> str:
    """Seconds of a spectral density of the Hessian, and of the peer's."""
    torch.manual_seed(0)
    model, X, y = problems.PROBLEMS[name]()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
    H = HessianLinearOperator(*arguments)
    methods: dict[str, Callable[[], Any]] = {
        "ours": lambda: estimate.spectral_density(
            H, num_probes=PROBES, num_steps=STEPS
        ).density(np.linspace(-1, 1, 1024))
    }
    try:
        import curvlinops
    except ImportError:
        pass
    else:
        theirs = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
        methods["peer"] = lambda: curvlinops.lanczos_approximate_spectrum(
            theirs, STEPS, num_repeats=PROBES
        )
        bounds = estimate.spectral_density(H, num_probes=1).bounds
        methods["peer, ends given"] = lambda: curvlinops.lanczos_approximate_spectrum(
            theirs, STEPS, num_repeats=PROBES, boundaries=bounds
        )
    times: dict[str, list[float]] = {key: [] for key in methods}
    for _ in range(rounds + 1):  # the first is to warm up
        for key, method in methods.items():
            times[key].append(timed(method)[0])
    cells = []
    for seconds in times.values():
        ratio = statistics.median(
            a / b for a, b in zip(seconds[1:], times["ours"][1:], strict=True)
        )
        cells.append(f"{statistics.median(seconds[1:]):.3g} ({ratio:.1f})")
    line = f"| {name} | {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def eigensolver(name: str, kind: str, rounds: int) -> str:
    """Largest eigenpairs, by SciPy and here, to the residual that SciPy has reached."""
    torch.manual_seed(0)
    model, X, y = problems.PROBLEMS[name]()
    make = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}[kind]
    params = list(model.parameters())
    A = Counted(make(model, nn.CrossEntropyLoss(), params, [(X, y)]))
    start = np.random.default_rng(0).standard_normal(A.shape[0]).astype(np.float32)
    for _ in range(5):
        A @ start

    def residual(values: Any, vectors: Any) -> float:
        defect = A @ vectors - vectors * values
        return float(np.linalg.norm(defect, axis=0).max() / np.abs(values).max())

    def by_scipy() -> Any:
        return eigsh(A, k=PAIRS, which="LA", v0=start, tol=TOLERANCE)

    reached = residual(*by_scipy())
    seconds: tuple[list[float], list[float]] = ([], [])
    counts, residuals = [0, 0], [reached, 0.0]
    for _ in range(rounds):
        for i, solve in enumerate(
            (by_scipy, lambda: estimate.eigsh(A, PAIRS, v0=start, tol=reached))
        ):
            A.columns = 0
            spent, pairs, times = timed(solve)
            counts[i] = A.columns // times
            seconds[i].append(spent)
            if i:
                residuals[1] = residual(*(x.numpy() for x in pairs))
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    single = ", one thread" if torch.get_num_threads() == 1 else ""
    line = (
        f"| {name}{single} | {kind} | {counts[1]} | {statistics.median(seconds[1]):.3g} | "
        f"{residuals[1]:.1e} | {counts[0]} | {statistics.median(seconds[0]):.3g} | "
        f"{residuals[0]:.1e} | {ratio:.2f} |"
    )
    print(line, flush=True)
    return line


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=["traces", "densities", "eigensolvers"])
    parser.add_argument("--problems", nargs="*", default=list(problems.PROBLEMS))
    parser.add_argument("--matrices", nargs="*", default=["Hessian", "GGN"])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    parts: dict[str, Callable[[], list[str]]] = {
        "traces": lambda: traces(arguments.methods),
        "densities": lambda: [
            density(name, arguments.rounds)
            for name in arguments.problems
            if name in ("tiny MLP", "MLP")
        ],
        "eigensolvers": lambda: [
            eigensolver(name, kind, arguments.rounds)
            for name in arguments.problems
            for kind in arguments.matrices
        ],
    }
    found = {
        key: part() if arguments.only in (None, key) else [] for key, part in parts.items()
    }
    if arguments.rows:
        known = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else {}
        found = {key: known.get(key, []) + rows for key, rows in found.items()}
        arguments.rows.write_text(json.dumps(found))
    text = page(found)
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(text)


def page(found: dict[str, list[str]]) -> str:
    """The tables as a page, from the rows of each."""
    try:
        peer = f"curvlinops-for-pytorch {metadata.version('curvlinops-for-pytorch')}"
    except metadata.PackageNotFoundError:
        peer = "the peer is not installed"
    table = [
        "# Estimators",
        "",
        "Printed by `python docs/benchmarks/estimators.py` (`tox run -e benchmark` "
        "installs the peer library). CPU, 2 threads; what is compared runs in turn, and "
        "ratios are medians of 3 rounds (5 for the tiny MLP's eigenpairs, one for "
        "ResNet-20 and GPT). The rows were measured one after another (`--rows`), on a "
        "machine that was otherwise quiet.",
        "",
        "## Products for one per cent of a trace",
        "",
        "The GGN of the digits classifier (2,410 parameters, float64), random signs. The "
        f"error is the root mean square over {SEEDS} seeds. On the right, where "
        "`rtol=0.01` stops.",
        "",
        "| method | products | error | products spent with rtol=0.01 | error |",
        "| --- | --- | --- | --- | --- |",
        *found["traces"],
        "",
        "## Spectral density",
        "",
        f"Seconds of the Hessian's density by {PROBES} probes with {STEPS} steps each, and "
        "in parentheses how many times longer than here. The peer finds the ends of the "
        "spectrum by SciPy's `eigsh`; on the right they are given to it.",
        "",
        "| problem | here | the peer | the peer, ends given |",
        "| --- | --- | --- | --- |",
        *found["densities"],
        "",
        "## Eigenpairs",
        "",
        f"The {PAIRS} largest eigenvalues of Hessian and GGN at initialization, float32, "
        f"from the same vector: SciPy's `eigsh` with `tol={TOLERANCE:g}`, and "
        "`estimate.eigsh` to the largest residual, relative to the largest eigenvalue, "
        "that SciPy has reached, its search for missed ones included.",
        "",
        "| problem | matrix | products here | seconds | residual | products by SciPy | "
        "seconds | residual | SciPy's seconds over ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *found["eigensolvers"],
        "",
        "The tiny MLP's solves take milliseconds, and there the setting decides. What is "
        "shown is the second half of ten runs in a row, since right after a run of the "
        "other library its threads still wait actively. With one thread (`--threads 1`, "
        "and `OMP_NUM_THREADS=1` for SciPy) SciPy is faster: here a step of Lanczos is "
        "some dozen calls with small tensors, and each has its overhead.",
        "",
        f"torchlinop {torchlinop.__version__}, torch {torch.__version__}, NumPy "
        f"{np.__version__}, SciPy {scipy.__version__}, Python "
        f"{platform.python_version()}, {peer}; {time.strftime('%Y-%m-%d')}.",
    ]
    return "\n".join(table) + "\n"


if __name__ == "__main__":
    main()
