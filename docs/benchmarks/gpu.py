"""Products, solves and exchange on a GPU, against a gradient and the peer library.

Prints and writes tables; needs a CUDA device, and CuPy for all but the products. With
``--device cpu --small`` it runs the same code on tiny problems, to see that it runs.

    python docs/benchmarks/gpu.py [--output docs/benchmarks/gpu.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.sparse.linalg as spla
import torch
import torchlinop
from torch import nn
from torchlinop import DiagonalLinearOperator, GGNLinearOperator, HessianLinearOperator

import problems

#: seconds one measurement takes at least
MEASURE = 0.1
Row = list[str]


class Clock:
    """Times functions in turn, waiting for the device where there is one."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def wait(self) -> None:
        """Let the device finish."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def compare(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds per call, in turn; NaN for a function that fails."""
        calls, working = {}, {}
        for name, function in functions.items():
            try:
                for _ in range(5):  # compiling, recording
                    function()
                calls[name] = max(1, int(MEASURE / self.once(function)))
                working[name] = function
            except Exception as error:  # the cell stays empty
                print(f"{name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        times: dict[str, list[float]] = {name: [] for name in working}
        for _ in range(self.rounds):
            for name, function in working.items():
                count = calls[name]

                def repeat(function: Any = function, count: int = count) -> None:
                    for _ in range(count):
                        function()

                times[name].append(self.once(repeat) / count)
        medians = {name: statistics.median(t) for name, t in times.items()}
        return {name: medians.get(name, float("nan")) for name in functions}


def peer_products(
    model: nn.Module, loss: nn.Module, params: list, data: list, v: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """The peer's products, eager and compiled, where it is installed."""
    if importlib.util.find_spec("curvlinops") is None:
        return {}
    import curvlinops

    functions = {}
    for label, kind in (
        ("Hessian", curvlinops.HessianLinearOperator),
        ("GGN", curvlinops.GGNLinearOperator),
    ):
        try:
            A = kind(model, loss, params, data, check_deterministic=False)
        except Exception as error:
            print(f"peer's {label}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        compiled = torch.compile(lambda x, A=A: A @ x)
        functions[f"{label}, peer"] = lambda A=A: A @ v
        functions[f"{label}, peer compiled"] = lambda f=compiled: f(v)
    return functions


def products(name: str, dtype: torch.dtype, clock: Clock) -> Row:
    """Products in gradients of the same loss; and per column of a block."""
    torch.manual_seed(0)
    model, X, y = getattr(problems, name)()
    model = model.to(clock.device, dtype)
    X = X.to(clock.device, dtype if X.is_floating_point() else X.dtype)
    y = y.to(clock.device)
    loss, params, data = nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
    H = HessianLinearOperator(model, loss, params, data)
    G = GGNLinearOperator(model, loss, params, data)
    n = H.shape[0]
    v = torch.rand(n, device=clock.device)
    functions: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(loss(model(X), y), params),
        "Hessian": lambda: H @ v,
        "GGN": lambda: G @ v,
    }
    columns = [k for k in (8, 32) if k * n < 5e8]
    for k in columns:
        block = torch.rand(n, k, device=clock.device)
        functions[f"GGN, {k}"] = lambda block=block: G @ block
    if dtype == torch.float32:
        functions |= peer_products(model, loss, params, data, v)
    seconds = clock.compare(functions)
    gradient = seconds["gradient"]
    cells = [name, f"{n:,}", str(dtype).removeprefix("torch."), f"{gradient * 1e6:.0f}"]
    for key in (
        *("Hessian", "Hessian, peer", "Hessian, peer compiled"),
        *("GGN", "GGN, peer", "GGN, peer compiled"),
    ):
        value = seconds.get(key, float("nan")) / gradient
        cells.append("-" if np.isnan(value) else f"{value:.2f}")
    for k in (8, 32):
        value = seconds.get(f"GGN, {k}", float("nan")) / gradient / k
        cells.append("-" if np.isnan(value) else f"{value:.2f}")
    print("| " + " | ".join(cells) + " |", flush=True)
    return cells


def eigenvalues(name: str, clock: Clock) -> list[Row]:
    """Ten eigenpairs from end to end by cupyx, by SciPy, and by SciPy on the peer."""
    torch.manual_seed(0)
    model, X, y = getattr(problems, name)()
    model, X, y = (t.to(clock.device) for t in (model, X, y))
    loss, params, data = nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
    H = HessianLinearOperator(model, loss, params, data)
    functions: dict[str, Callable[[], Any]] = {}
    if clock.device == "cuda" and importlib.util.find_spec("cupyx"):
        import cupyx.scipy.sparse.linalg as cusp

        functions["cupyx eigsh"] = lambda: cusp.eigsh(H, k=10, tol=1e-4)
    functions["SciPy eigsh"] = lambda: spla.eigsh(H, k=10, tol=1e-4)
    if importlib.util.find_spec("curvlinops"):
        import curvlinops

        peer = curvlinops.HessianLinearOperator(
            model, loss, params, data, check_deterministic=False
        ).to_scipy()
        functions["SciPy eigsh on the peer's operator"] = lambda: spla.eigsh(
            peer, k=10, tol=1e-4
        )
    rows = []
    for label, function in functions.items():
        pairs = function()
        seconds = statistics.median(clock.once(function) for _ in range(3))
        report = torchlinop.verify.eigenpairs(H, *pairs)
        worst = report.relative_residuals.max()
        rows.append([name, label, f"{seconds:.3g}", f"{worst:.1e}"])
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def exchange(clock: Clock) -> list[Row]:
    """Microseconds of a product with a diagonal matrix beyond the multiplication itself."""
    rows = []
    for n in (1_000, 1_000_000):
        d = torch.ones(n, device=clock.device)
        A = DiagonalLinearOperator(d)
        x = torch.ones(n, device=clock.device)
        host = np.ones(n, "f")
        functions: dict[str, Callable[[], object]] = {
            "multiplication": lambda d=d, x=x: d * x,
            "torch": lambda A=A, x=x: A @ x,
            "NumPy": lambda A=A, host=host: A @ host,
        }
        if clock.device == "cuda" and importlib.util.find_spec("cupy"):
            import cupy

            array = cupy.ones(n, "f")
            functions["CuPy"] = lambda A=A, array=array: A @ array
        seconds = clock.compare(functions)
        base = seconds.pop("multiplication")
        for kind, value in seconds.items():
            rows.append([f"{n:,}", kind, f"{(value - base) * 1e6:.1f}"])
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def table(header: str, rows: list[Row]) -> list[str]:
    """Lines of a table in Markdown."""
    count = header.count("|") + 1
    lines = [f"| {header} |", "|" + " --- |" * count]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def versions(device: str) -> str:
    """What was measured on what, and when."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    cupy = "no CuPy"
    if device == "cuda" and importlib.util.find_spec("cupy"):
        import cupy as module

        cupy = f"CuPy {module.__version__}"
    return (
        f"{where}; torchlinop {torchlinop.__version__}, torch {torch.__version__}, {cupy}, "
        f"NumPy {np.__version__}, SciPy {scipy.__version__}, Python "
        f"{platform.python_version()}; {time.strftime('%Y-%m-%d')}."
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny problems only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device: nothing is measured\n")
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("highest")
    clock = Clock(arguments.device, arguments.rounds)
    names = ["tiny_mlp"] if arguments.small else ["tiny_mlp", "mlp", "resnet18", "gpt2"]
    rows = [
        products(name, dtype, clock)
        for name in names
        for dtype in (torch.float32, torch.bfloat16)
    ]
    pairs = [row for name in names[:2] for row in eigenvalues(name, clock)]
    costs = exchange(clock)
    text = "\n".join(
        [
            "# On a GPU",
            "",
            "Printed by `python docs/benchmarks/gpu.py`.",
            "",
            "## Products, in gradients of the same loss",
            "",
            *table(
                "problem | parameters | dtype | gradient, us | Hessian | peer's | peer's "
                "compiled | GGN | peer's | peer's compiled | GGN per column of 8 | of 32",
                rows,
            ),
            "## Ten eigenpairs of the Hessian, from end to end",
            "",
            *table("problem | solver | seconds | largest relative residual", pairs),
            "## Exchange and checks per product, beyond the multiplication",
            "",
            *table("entries | array | microseconds", costs),
            versions(arguments.device),
        ]
    )
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
