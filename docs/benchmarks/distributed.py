"""Products with Hessians and GGNs whose data is spread over processes.

Starts itself on one and on several processes, one thread each, and prints the time of a
product, the efficiency, and the bytes that a process sends against the least that any
algorithm has to. Then what follows for larger models and more ranks, computed from
measured constants.

    python docs/benchmarks/distributed.py [--ranks 1 2] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchlinop
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator
from torchlinop.distributed.line import Line

import problems

#: products in which linearizations are made and ways to multiply are tried
WARM_UP = 12
NAMES = ("MLP", "ResNet-20")
KINDS = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}


# ------------------------------------------------------------------------ on a rank


class Sent:
    """Counts what collective calls move."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.seconds = 0.0
        self._finish = Line._finish

    def __enter__(self) -> Sent:
        sent, finish = self, self._finish

        def counted(line: Line, start: Any, tensor: torch.Tensor, what: str) -> None:
            began = time.perf_counter()
            finish(line, start, tensor, what)
            sent.seconds += time.perf_counter() - began
            sent.nbytes += tensor.nbytes

        Line._finish = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Line._finish = self._finish  # type: ignore[method-assign]


def measure(folder: str, rounds: int) -> None:
    """Time products on this rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name in NAMES:
        torch.manual_seed(0)
        model, X, y = problems.PROBLEMS[name]()
        share = [(X.chunk(size)[rank], y.chunk(size)[rank])]
        for kind, operator in KINDS.items():
            H = operator(
                model,
                nn.CrossEntropyLoss(),
                list(model.parameters()),
                share,
                process_group=dist.group.WORLD,
            )
            with torchlinop.distributed.driver(H) as A, Sent() as sent:
                if A is not None:
                    v = torch.randn(A.shape[0])
                    times, talks = [], []
                    for i in range(WARM_UP + rounds):
                        sent.nbytes, sent.seconds = 0, 0.0
                        began = time.perf_counter()
                        A @ v
                        if i >= WARM_UP:
                            times.append(time.perf_counter() - began)
                            talks.append(sent.seconds)
                    found[f"{kind}, {name}"] = {
                        "seconds": statistics.median(times),
                        "talk": statistics.median(talks),
                        "nbytes": sent.nbytes,
                        "vector": v.nbytes,
                    }
    found["network"] = network(rounds)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def network(rounds: int) -> dict[str, float]:
    """Seconds of a small all-reduce, and bytes a second of a large one."""
    times = {}
    for number in (1, 4_000_000):
        x = torch.zeros(number)
        samples = []
        for _ in range(rounds):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            samples.append(time.perf_counter() - began)
        times[number] = statistics.median(samples)
    return {"latency": times[1], "bandwidth": 16e6 / (times[4_000_000] - times[1])}


def start(ranks: int, rounds: int) -> dict[str, Any]:
    """Run :func:`measure` on several ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", __file__, "--on-rank", folder]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        subprocess.run(
            [*command, "--rounds", str(rounds)], check=True, env=os.environ | threads
        )
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found


# --------------------------------------------------------------------------- tables


def scaling(found: dict[int, dict[str, Any]]) -> list[str]:
    """Return the table of measured products."""
    lines = [
        "| | ranks | ms a product | speed-up | efficiency | of it talking, ms "
        "| bytes in messages | least |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    one = found[min(found)]
    for case in one:
        if case == "network":
            continue
        for ranks, all_cases in sorted(found.items()):
            its = all_cases[case]
            speedup = one[case]["seconds"] / its["seconds"]
            lines.append(
                f"| {case} | {ranks} | {1e3 * its['seconds']:.1f} | {speedup:.2f} "
                f"| {speedup / ranks:.0%} | {1e3 * its['talk']:.1f} "
                f"| {its['nbytes']:,} | {2 * its['vector']:,} |"
            )
    return lines


class Machine:
    """Constants of an accelerator and its network.

    Not measured here: what makers and users state.
    """

    name = "80 GB, 400 TFLOP/s sustained, 25 GB/s to others, 10 us a message"
    memory, flops, bandwidth, latency = 80e9, 4e14, 25e9, 1e-5


def outlook() -> list[str]:
    """Return the table of what is computed, for one token batch a rank."""
    machine = Machine
    lines = [
        "| parameters | ranks | memory of a rank, GB | compute, s | talking, s "
        "| product, s | efficiency | what is in the way |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    tokens = 2**20  # of all data, in one product
    for parameters in (1e8, 1e9, 7e9, 70e9):
        for ranks in (1, 8, 64, 512):
            # parameters in two bytes; vector, product and message in four
            weights, vectors = 2 * parameters, 3 * 4 * parameters
            # of one sequence of 2,048 tokens, recomputed in each product: measured on GPT-2
            graph = 2048 * GRAPH_BYTES_PER_TOKEN_AND_ROOT * parameters**0.5
            memory = weights + vectors + graph
            # a Hessian product without anything kept: four gradients of 6 flops each
            compute = 4 * 6 * parameters * tokens / ranks / machine.flops
            steps = max(ranks - 1, 0)
            talk = (1 + 2) * 4 * parameters * steps / ranks / machine.bandwidth
            talk += 3 * steps * machine.latency
            product = compute + talk
            efficiency = compute / product
            trouble = ""
            if memory > machine.memory:
                trouble = "memory: " + (
                    "the vectors alone" if vectors > machine.memory else "vectors and graph"
                )
            elif talk > compute:
                trouble = "network"
            lines.append(
                f"| {parameters:,.0f} | {ranks} | {memory / 1e9:.0f} | {compute:.2f} "
                f"| {talk:.2f} | {product:.2f} | {efficiency:.0%} | {trouble} |"
            )
    return lines


#: of activations and their graph, for each token and the root of the number of parameters
GRAPH_BYTES_PER_TOKEN_AND_ROOT = 160.0


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--on-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.on_rank:
        measure(options.on_rank, options.rounds)
        return
    found = {ranks: start(ranks, options.rounds) for ranks in options.ranks}
    largest = found[max(found)]["network"]
    text = [
        f"Measured with torch {torch.__version__}, gloo, {platform.machine()}, "
        f"{os.cpu_count()} cores, float32, one thread a process; medians of "
        f"{options.rounds} products.",
        "",
        *scaling(found),
        "",
        f"An all-reduce takes {1e6 * largest['latency']:.0f} us and "
        f"{largest['bandwidth'] / 1e9:.2f} GB/s on {max(found)} ranks (measured).",
        "",
        f"Computed for {Machine.name}:",
        "",
        *outlook(),
    ]
    print("\n".join(text))
    if options.output:
        options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
