"""Data larger than memory, and runs that are killed: seconds, memory, what is lost.

60,000 samples of MNIST's shape behind a DataLoader with workers, on the CPU; every case in
a process of its own. A table is printed for each part.

    python docs/benchmarks/large_data.py [--part passes|moving|resume] [--samples 60000]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchlinop import (
    Checkpoint,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    estimate,
)

BATCH = 500
MEGABYTE = 1 << 20
#: workers, and the memory budget in MB (None: the default, half of what is free)
CASES = [(0, 0), (2, 0), (2, 200), (2, None)]


class Images(Dataset):
    """Random images of MNIST's shape, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = torch.Generator().manual_seed(i)
        return torch.rand(784, generator=pixels), i % 10


def resident() -> float:
    """MB that this process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def network(width: int = 128) -> nn.Module:
    """Return a network with random weights, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, 10))


def passes(samples: int, workers: int, budget: int | None) -> None:
    """Print a row: reading alone, the first product and later ones, memory."""
    loader = DataLoader(Images(samples), batch_size=BATCH, num_workers=workers)
    start = time.perf_counter()
    for _ in loader:
        pass
    reading = time.perf_counter() - start
    model = network()
    memory: list[float] = []

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        memory.append(resident())
        return torch.func.functional_call(model, params, (X,))

    G = GGNLinearOperator(
        predict,
        nn.CrossEntropyLoss(),
        dict(model.named_parameters()),
        loader,
        memory_budget=None if budget is None else budget * MEGABYTE,
        check_deterministic=False,
    )
    v = torch.randn(G.shape[1])
    seconds: list[float] = []
    evaluated: list[float] = []  # memory in the last product that evaluates the model
    for _ in range(3 if budget is not None else 6):
        del memory[:]
        start = time.perf_counter()
        G @ v
        seconds.append(time.perf_counter() - start)
        evaluated = memory[:] or evaluated
    first, *later = seconds
    label = "half of what is free" if budget is None else f"{budget} MB"
    print(
        f"| {workers} | {label} | {reading:.2f} | {first:.2f} | "
        f"{statistics.median(later):.3g} | {evaluated[0]:.0f} | {evaluated[-1]:.0f} | "
        f"{G._maps.nbytes / MEGABYTE:.0f} |"
    )


def interrupted(samples: int) -> None:
    """Print how long Ctrl-C takes to end a product, and whether the next one is right."""
    model = network()
    loader = DataLoader(Images(samples), batch_size=BATCH, num_workers=2)
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters())
    G = GGNLinearOperator(*arguments, loader, memory_budget=0, check_deterministic=False)
    v = torch.randn(G.shape[1])
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.5, send).start()
    try:
        G @ v
    except KeyboardInterrupt:
        print(f"Ctrl-C ends a product after {time.perf_counter() - sent[0]:.2f} s", end="")
    images = [loader.dataset[i][0] for i in range(samples)]
    whole = [(torch.stack(images), torch.arange(samples) % 10)]
    expected = GGNLinearOperator(*arguments, whole) @ v
    error = torch.linalg.vector_norm(G @ v - expected) / torch.linalg.vector_norm(expected)
    print(f"; the next product is right to {error.item():.0e}")


def moving() -> None:
    """Print from which bandwidth on moving a linearization pays."""
    networks = {
        "MLP 784-128-10": (network(), (BATCH, 784)),
        "MLP 784-512-512-10": (
            nn.Sequential(
                *(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh()),
                nn.Linear(512, 10),
            ),
            (BATCH, 784),
        ),
        "CNN, 2 x 16 channels": (
            nn.Sequential(
                *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
                *(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(576, 10)),
            ),
            (100, 1, 28, 28),
        ),
    }
    print("| network, batch | bytes | anew | kept | kept, copied | pays from |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (model, shape) in networks.items():
        data = [(torch.rand(shape), torch.arange(shape[0]) % 10)]
        arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), data
        kept, anew = (GGNLinearOperator(*arguments, cache=cache) for cache in (True, False))
        v = torch.randn(kept.shape[1])
        times: dict[str, list[float]] = {"anew": [], "kept": [], "copied": []}
        kept @ v
        size = kept._maps.nbytes
        host, device = torch.ones(size, dtype=torch.uint8), torch.ones(size).byte()
        for _ in range(9):
            for key, product in (("anew", anew), ("kept", kept)):
                start = time.perf_counter()
                product @ v
                times[key].append(time.perf_counter() - start)
            start = time.perf_counter()
            device.copy_(host)
            times["copied"].append(time.perf_counter() - start)
        slow, quick, copy = (
            statistics.median(times[k]) for k in ("anew", "kept", "copied")
        )
        rate = size / max(slow - quick, 1e-9) / 1e9
        print(
            f"| {name}, {shape[0]} | {size / MEGABYTE:.1f} MB | {1e3 * slow:.1f} ms | "
            f"{1e3 * quick:.1f} ms | {1e3 * (quick + copy):.1f} ms | {rate:.2g} GB/s |"
        )


def hessian(samples: int) -> HessianLinearOperator:
    """Return the Hessian of a network on the first samples."""
    model = network(64)
    loader = DataLoader(Images(samples), batch_size=BATCH, num_workers=0)
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), loader
    return HessianLinearOperator(*arguments, check_deterministic=False)


def killed(path: str, samples: int) -> None:
    """Run until the parent kills this process."""
    print("begun", flush=True)
    estimate.eigsh(
        hessian(samples), k=10, tol=1e-6, checkpoint=Checkpoint(path, seconds=0.2)
    )


def resume(samples: int) -> None:
    """Kill a run again and again; print products, seconds and the answer."""
    start = time.perf_counter()
    expected = estimate.eigsh(hessian(samples), k=10, tol=1e-6)
    undisturbed = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        command = [sys.executable, __file__, "--killed", str(path)]
        for _ in range(2):
            with subprocess.Popen(
                [*command, "--samples", str(samples)], stdout=subprocess.PIPE
            ) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(0.5 * undisturbed)
                child.kill()
        size = path.stat().st_size / MEGABYTE
        start = time.perf_counter()
        pairs = estimate.eigsh(hessian(samples), k=10, tol=1e-6, checkpoint=path)
        rest = time.perf_counter() - start
        error = (pairs.eigenvalues / expected.eigenvalues - 1).abs().max().item()
        state = torch.rand(40, 118_282)
        start = time.perf_counter()
        A = IdentityLinearOperator([(1,)], "cpu", torch.float32)
        run = Checkpoint(path.with_name("other")).begin("timing", {"A": A}, {}, {})
        run.save({"state": state})
        writing = time.perf_counter() - start
    print(
        f"undisturbed: {expected.num_matvecs} products, {undisturbed:.1f} s; killed twice "
        f"after {0.5 * undisturbed:.1f} s each, then {rest:.1f} s more, "
        f"{pairs.num_matvecs} products in all; eigenvalues differ by {error:.0e}; the file "
        f"has {size:.1f} MB; {state.nbytes / MEGABYTE:.0f} MB take {writing:.2f} s to write"
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["passes", "moving", "resume"])
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--killed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.killed:
        killed(options.killed, options.samples)
    elif options.case is not None:
        passes(options.samples, *CASES[options.case])
    else:
        if options.part in (None, "passes"):
            columns = "reading | first | later | first batch | last batch | kept |"
            print(f"| workers | budget | {columns}")
            print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for case in range(len(CASES)):
                command = [sys.executable, __file__, "--case", str(case)]
                subprocess.run([*command, "--samples", str(options.samples)], check=True)
            interrupted(options.samples // 2)
        if options.part in (None, "moving"):
            moving()
        if options.part in (None, "resume"):
            resume(options.samples // 10)


if __name__ == "__main__":
    main()
