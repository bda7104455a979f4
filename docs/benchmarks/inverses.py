"""Solves with damped GGNs: one and many right-hand sides, SciPy, the peer, preconditioners.

Everything runs in one process, interleaved, on the CPU with two threads; tables of
medians are printed and written.

    python docs/benchmarks/inverses.py [--rounds 3] [--output docs/benchmarks/inverses.md]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import scipy.sparse.linalg as spla
import torch
import torchlinop
from torch import Tensor, nn
from torchlinop import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    JacobiPreconditioner,
    NystromPreconditioner,
    multishift_cg,
)
from torchlinop.examples import digits

import problems

RTOL = 1e-4
COLUMNS = 32


@dataclass
class Setting:
    """A damped GGN and right-hand sides: gradients of single samples."""

    name: str
    model: nn.Module
    data: list[tuple[Tensor, Tensor]]
    damping: float

    def __post_init__(self) -> None:
        self.loss = nn.CrossEntropyLoss()
        self.params = list(self.model.parameters())
        self.G = GGNLinearOperator(self.model, self.loss, self.params, self.data)
        X, y = self.data[0]
        gradients = []
        for i in range(COLUMNS):
            loss = self.loss(self.model(X[i : i + 1]), y[i : i + 1])
            parts = torch.autograd.grad(loss, self.params)
            gradients.append(torch.cat([g.reshape(-1) for g in parts]))
        self.B = torch.stack(gradients, dim=1)


@dataclass
class Method:
    """A way to solve for a block; counts the vectors multiplied."""

    solve: Callable[[Tensor], Tensor]
    products: Callable[[], int]


def ours(setting: Setting) -> Method:
    """One block solve of torchlinop."""
    inverse = CGInverseLinearOperator(setting.G, damping=setting.damping, rtol=RTOL)
    return Method(lambda B: inverse @ B, lambda: inverse.last_solve.num_matvecs)


def ours_one_by_one(setting: Setting) -> Method:
    """Solve by torchlinop, a column at a time."""
    inverse = CGInverseLinearOperator(setting.G, damping=setting.damping, rtol=RTOL)
    count = [0]

    def solve(B: Tensor) -> Tensor:
        count[0] = 0
        columns = []
        for b in B.T:
            columns.append(inverse @ b)
            count[0] += inverse.last_solve.num_matvecs
        return torch.stack(columns, dim=1)

    return Method(solve, lambda: count[0])


def by_scipy(setting: Setting) -> Method:
    """SciPy's cg on the same operator, a column at a time."""
    shapes = [p.shape for p in setting.params]
    identity = torchlinop.IdentityLinearOperator(shapes, "cpu", setting.G.torch_dtype)
    A = setting.G + setting.damping * identity
    count = [0]

    def step(_: np.ndarray) -> None:
        count[0] += 1

    def solve(B: Tensor) -> Tensor:
        count[0] = 0
        columns = [spla.cg(A, b.numpy(), rtol=RTOL, callback=step)[0] for b in B.T]
        return torch.from_numpy(np.stack(columns, axis=1))

    return Method(solve, lambda: count[0])


def by_peer(setting: Setting) -> Method | None:
    """Curvlinops' inverse, where it is installed."""
    try:
        import curvlinops
        from curvlinops.examples import IdentityLinearOperator
    except ImportError:
        return None
    G = curvlinops.GGNLinearOperator(
        setting.model, setting.loss, setting.params, setting.data, check_deterministic=False
    )
    shapes = [p.shape for p in setting.params]
    damping = IdentityLinearOperator(shapes, torch.device("cpu"), torch.float32)
    inverse = curvlinops.CGInverseLinearOperator(
        G + setting.damping * damping, tolerance=RTOL, max_iter=1000
    )
    count, multiply = [0], G._matmat

    def counted(X: list[Tensor]) -> list[Tensor]:
        count[0] += X[0].shape[-1]
        return multiply(X)

    G._matmat = counted

    def solve(B: Tensor) -> Tensor:
        count[0] = 0
        return inverse @ B

    return Method(solve, lambda: count[0])


def residual(setting: Setting, X: Tensor, B: Tensor) -> float:
    """Largest relative residual of the columns."""
    R = setting.G @ X + setting.damping * X - B
    return (R.norm(dim=0) / B.norm(dim=0)).max().item()


@torchlinop.single_threaded_blas()
def compare(setting: Setting, rounds: int) -> list[str]:
    """Solve in turn by every method; returns lines of a table."""
    methods = {
        ("this package", 1): ours(setting),
        ("SciPy's cg", 1): by_scipy(setting),
        ("the peer", 1): by_peer(setting),
        ("this package, one block", COLUMNS): ours(setting),
        ("this package, one by one", COLUMNS): ours_one_by_one(setting),
        ("SciPy's cg, one by one", COLUMNS): by_scipy(setting),
        ("the peer, one block", COLUMNS): by_peer(setting),
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in methods}
    answers = {}
    setting.G @ setting.B
    for _ in range(5):
        setting.G @ setting.B[:, 0]
    for _ in range(rounds):
        for key, method in methods.items():
            if method is None:
                continue
            B = setting.B[:, : key[1]].contiguous()
            start = time.perf_counter()
            X = method.solve(B)
            times[key].append(time.perf_counter() - start)
            answers[key] = residual(setting, X, B), method.products()
    lines = []
    for (name, columns), seconds in times.items():
        if not seconds:
            continue
        base = times[("this package" + ", one block" * (columns > 1), columns)]
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        error, products = answers[(name, columns)]
        lines.append(
            f"| {setting.name} | {columns} | {name} | {products:,} | "
            f"{statistics.median(seconds):.3g} | {ratio:.2f} | {error:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def precondition(setting: Setting) -> list[str]:
    """Products to the tolerance with and without preconditioners."""
    G, damping = setting.G, setting.damping
    values = np.linalg.eigvalsh(G.to_dense().double().numpy())
    condition = (values[-1] + damping) / (values[0] + damping)
    nystrom = NystromPreconditioner(G, damping=damping)
    sketches = {
        "none": (None, 0),
        "Jacobi, exact": (JacobiPreconditioner(G, damping=damping), G.shape[0]),
        "Jacobi, 100 random signs": (
            JacobiPreconditioner.estimated(G, damping=damping, num_matvecs=100),
            100,
        ),
        f"Nyström, rank {nystrom.rank}": (nystrom, nystrom.num_matvecs),
    }
    lines = []
    for name, (M, setup) in sketches.items():
        inverse = CGInverseLinearOperator(G, damping=damping, rtol=RTOL, M=M)
        cells = []
        for columns in (1, COLUMNS):
            B = setting.B[:, :columns].contiguous()
            X = inverse @ B
            error = residual(setting, X, B)
            cells.append(f"{inverse.last_solve.num_matvecs:,} | {error:.1e}")
        lines.append(
            f"| {damping:g} | {condition:.1e} | {name} | {setup:,} | {' | '.join(cells)} |"
        )
        print(lines[-1], flush=True)
    return lines


def shifts(setting: Setting) -> str:
    """Products for ten dampings, together and one after another."""
    dampings = np.logspace(-3, 0, 10)
    b = setting.B[:, 0].contiguous()
    _, report = multishift_cg(setting.G, b, dampings, rtol=RTOL)
    inverse = CGInverseLinearOperator(setting.G, rtol=RTOL)
    apart = 0
    for damping in dampings:
        solver = inverse.with_damping(damping)
        solver @ b
        apart += solver.last_solve.num_matvecs
    text = (
        f"Ten dampings from {dampings[0]:g} to {dampings[-1]:g} ({setting.name}, one "
        f"right-hand side): {report.num_matvecs} products by `multishift_cg`, {apart} by "
        "ten solves."
    )
    print(text, flush=True)
    return text


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    classifier, data, _ = digits.train()
    classifier = classifier.float()
    data = [(X.float(), y) for X, y in data]
    model, X, y = problems.mlp()
    lines = compare(Setting("digits", classifier, data, 1e-3), arguments.rounds)
    lines += compare(Setting("MLP", model, [(X, y)], 1e-3), arguments.rounds)
    together = shifts(Setting("digits", classifier, data, 1e-3))
    classifier = classifier.double()  # for condition numbers that float32 cannot solve
    data = [(X.double(), y) for X, y in data]
    helped = []
    for damping in (1e-3, 1e-5):
        helped += precondition(Setting("digits", classifier, data, damping))

    import importlib.metadata as metadata

    try:
        peer = f"curvlinops-for-pytorch {metadata.version('curvlinops-for-pytorch')}"
    except metadata.PackageNotFoundError:
        peer = "the peer is not installed"
    table = [
        "# Inverses",
        "",
        "Printed by `python docs/benchmarks/inverses.py` (`tox run -e benchmark` installs "
        "the peer library). Damped GGNs, float32, CPU, 2 threads: the digits classifier of "
        "`torchlinop/examples/digits.py` (2,410 parameters, 1,500 samples in three "
        "batches) and the MLP of the product benchmark (535,818 parameters, 256 samples), "
        "damping 1e-3. Right-hand sides are gradients of single samples.",
        "",
        f"## To a relative residual of {RTOL:g}",
        "",
        "| problem | right-hand sides | method | vectors multiplied | seconds | times this "
        "package | largest residual |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
        "",
        f"Solved in turn, medians of {arguments.rounds} rounds; ratios round by round.",
        "",
        "## Preconditioners",
        "",
        "Vectors multiplied with the digits GGN, for making the preconditioner and for "
        f"solving to {RTOL:g}; float64.",
        "",
        "| damping | condition number | preconditioner | to make it | one right-hand side "
        f"| residual | {COLUMNS} right-hand sides | residual |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *helped,
        "",
        together,
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
