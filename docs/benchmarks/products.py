"""Hessian and GGN products against a gradient of the same loss and the peer library.

Everything runs in one process, interleaved, on the CPU with two threads; a table of
medians, as ratios to the gradient, is printed and written.

    python docs/benchmarks/products.py [--rounds 11] [--output docs/benchmarks/products.md]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import torchlinop
from by_hand import ByHand
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchlinop import GGNLinearOperator, HessianLinearOperator

from problems import PROBLEMS

KINDS = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}
#: time one measurement takes at least, in seconds
MEASURE = 0.05


def interleaved(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Time every function once per round, in turn; returns seconds per call."""
    calls = {}
    for name, function in functions.items():
        function(), function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(MEASURE / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def peer_operators(model: nn.Module, loss: nn.Module, params: list, data: list) -> dict:
    """The same operators of curvlinops, where it is installed and can build them."""
    try:
        import curvlinops
    except ImportError:
        return {}
    operators = {}
    for label, kind in (
        ("Hessian, peer", curvlinops.HessianLinearOperator),
        ("GGN, peer", curvlinops.GGNLinearOperator),
    ):
        try:
            operator = kind(model, loss, params, data, check_deterministic=False)
            v = torch.rand(operator.shape[1])
            operator @ v
        except Exception as error:  # the row stays empty
            print(f"{label}: {type(error).__name__}: {str(error)[:100]}")
        else:
            operators[label] = lambda operator=operator, v=v: operator @ v
    return operators


def first_product(make: Callable[[], LinearOperator], v: Tensor, rounds: int) -> float:
    """Seconds of an operator's first product, which linearizes: the median."""
    times = []
    for _ in range(rounds):
        A = make()
        start = time.perf_counter()
        A @ v
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors that live at one time during a call, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [
        e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    current = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        most = max(most, current)
    del result
    return most


def memory(make: Callable[[], LinearOperator], v: Tensor) -> tuple[int, int, int]:
    """Bytes kept, and peaks of sixty products: the first one, and the others."""
    A = make()
    first = peak_bytes(lambda: A @ v)
    kept = A._maps.nbytes
    vectors = [torch.rand_like(v) for _ in range(60)]
    others = max(peak_bytes(lambda w=w: A @ w) for w in vectors)
    return kept, first, kept + others


def by_hand(model: nn.Module, X: Tensor, y: Tensor, v: Tensor, V: Tensor) -> dict:
    """The same products in plain torch, once they are seen to be the same."""
    written, functions = ByHand(model, X, y), {}
    for label, kind in KINDS.items():
        A = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)])
        kept, once = written.kept(label), written.once(label)
        for name, function in (("by hand", kept), ("no cache, by hand", once)):
            torch.testing.assert_close(function(v), A @ v, rtol=1e-3, atol=1e-5)
            functions[f"{label}, {name}"] = partial(function, v)
        functions[f"{label}, no cache, block, by hand"] = partial(written.block(label), V)
    return functions


def own_share(G: HessianLinearOperator, calls: int = 2000) -> float:
    """Microseconds of a NumPy product that are not spent in its kernels.

    The smallest of ten medians, since the machine's own speed changes by more than a half
    from one second to the next.
    """
    v = np.random.default_rng(0).random(G.shape[1], dtype=np.float32)
    for _ in range(100):  # until it is settled how products are made
        G @ v
    rows = next(iter(G._maps._kept.maps.values()))
    run, inside, outside = rows._run, [], []

    def timed(x: Tensor) -> Tensor:
        start = time.perf_counter()
        y = run(x)
        inside.append(time.perf_counter() - start)
        return y

    rows._run = timed
    for _ in range(calls):
        start = time.perf_counter()
        G @ v
        outside.append(time.perf_counter() - start)
    rows._run = run
    shares = [1e6 * (a - b) for a, b in zip(outside, inside, strict=True)]
    block = calls // 10
    return min(statistics.median(shares[i : i + block]) for i in range(0, calls, block))


def float64_error(model: nn.Module, X: Tensor, y: Tensor, v: Tensor) -> float:
    """Relative distance of a float32 Hessian product from torch's own float64 one."""
    loss = nn.CrossEntropyLoss()
    H = HessianLinearOperator(model, loss, list(model.parameters()), [(X, y)])
    double = copy.deepcopy(model).double()
    X = X.double() if X.is_floating_point() else X
    params = list(double.parameters())
    gradient = torch.autograd.grad(loss(double(X), y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    product = torch.autograd.grad(flat, params, v.double())
    exact = torch.cat([p.reshape(-1) for p in product])
    return ((H @ v).double() - exact).norm().item() / exact.norm().item()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    rows, more, errors, shares = [], [], [], []
    firsts: dict[tuple[str, str], float] = {}
    peaks: dict[tuple[str, str], Any] = {}
    for name in arguments.only:
        torch.manual_seed(0)
        model, X, y = PROBLEMS[name]()
        loss, params, data = nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
        H = HessianLinearOperator(model, loss, params, data)
        v = torch.rand(H.shape[1])

        def gradient(model=model, loss=loss, params=params, X=X, y=y) -> tuple:
            return torch.autograd.grad(loss(model(X), y), params)

        V = torch.rand(H.shape[1], 8)
        functions = {"gradient": gradient}
        for label, kind in KINDS.items():

            def make(
                kind=kind, model=model, loss=loss, params=params, data=data, **options
            ):
                return kind(model, loss, params, data, **options)

            A, blocks, uncached, plain = make(), make(), make(cache=False), make()
            plain._maps.experience.replays_pay = False
            for _ in range(80):  # until it is settled how products are made
                A @ v
            for _ in range(10):
                blocks @ V
            functions[label] = lambda A=A, v=v: A @ v
            functions[f"{label}, graph"] = lambda A=plain, v=v: A @ v
            functions[f"{label}, block"] = lambda A=blocks, V=V: A @ V
            functions[f"{label}, no cache"] = lambda A=uncached, v=v: A @ v
            functions[f"{label}, no cache, block"] = lambda A=uncached, V=V: A @ V
            firsts[name, label] = first_product(make, v, arguments.rounds)
            peaks[name, label] = memory(make, v)
        peaks[name, "gradient"] = peak_bytes(gradient)
        functions |= by_hand(model, X, y, v, V)
        functions |= peer_operators(model, loss, params, data)
        times = interleaved(functions, arguments.rounds)
        medians = {k: statistics.median(t) for k, t in times.items()}
        reference = medians["gradient"]
        cells = [f"{reference * 1e6:.0f}"]
        for key in ("Hessian", "Hessian, peer", "GGN", "GGN, peer"):
            if key not in medians:
                cells.append("fails")
                continue
            ratios = [a / b for a, b in zip(times[key], times["gradient"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        rows.append(f"| {name} | {H.shape[1]:,} | " + " | ".join(cells) + " |")
        for label in KINDS:
            ratio = {k: t / reference for k, t in medians.items() if k.startswith(label)}
            kept, first, others = (bytes_ / 2**20 for bytes_ in peaks[name, label])
            more.append(
                f"| {name} | {label} | {ratio[label]:.2f} | "
                f"{ratio[f'{label}, graph']:.2f} | {ratio[f'{label}, by hand']:.2f} | "
                f"{ratio[f'{label}, block'] / 8:.2f} | {ratio[f'{label}, no cache']:.2f} | "
                f"{ratio[f'{label}, no cache, by hand']:.2f} | "
                f"{ratio[f'{label}, no cache, block'] / 8:.2f} | "
                f"{ratio[f'{label}, no cache, block, by hand'] / 8:.2f} | "
                f"{firsts[name, label] / reference:.1f} | {kept:.2f} | {first:.2f} | "
                f"{others:.2f} | {peaks[name, 'gradient'] / 2**20:.2f} |"
            )
            print(more[-1], flush=True)
        errors.append((name, float64_error(model, X, y, v)))
        if H.shape[1] < 10_000:  # where it matters
            shares.append((name, own_share(H)))
        print(rows[-1], flush=True)

    import importlib.metadata as metadata

    try:
        peer = f"curvlinops-for-pytorch {metadata.version('curvlinops-for-pytorch')}"
    except metadata.PackageNotFoundError:
        peer = "the peer is not installed"
    command = "python docs/benchmarks/products.py"
    table = [
        "# Products",
        "",
        f"Printed by `{command}` (`tox run -e benchmark` installs the peer library).",
        "",
        "| problem | parameters | gradient, us | Hessian product | peer's | GGN product "
        "| peer's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "Products in gradients of the same loss, timed in turn: median of "
        f"{arguments.rounds} round-by-round ratios (and their quartiles). float32, one "
        "batch, torch vectors, CPU, 2 threads.",
        "",
        "| problem | matrix | product | without replay | by hand | column of 8 | no cache "
        "| by hand | no cache, column of 8 | by hand | first product | kept, MiB | peak of "
        "the first, MiB | of others, MiB | of a gradient, MiB |",
        "| " + " | ".join(["---"] * 15) + " |",
        *more,
        "",
        "In gradients. *By hand*: the same written in plain torch, for this model and "
        "this loss (a retained graph of double backward; forward mode for a GGN product of "
        "which nothing is kept). A first product linearizes. Peaks are bytes of tensors "
        "that live at one time, beside model and data; those of sixty other products (with "
        "the recording of a replay, where there is one) include what is kept.",
        "",
        "Relative distance of the float32 Hessian product from the float64 one: "
        + ", ".join(f"{name} {error:.1e}" for name, error in errors)
        + ".",
        "",
        "The package's own share of a Hessian product with a NumPy vector (exchange, "
        "checks, flattening), in microseconds, smallest of ten medians of 200 calls: "
        + ", ".join(f"{name} {share:.0f}" for name, share in shares)
        + ".",
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
