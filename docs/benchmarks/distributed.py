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
#: problems, how many of its batches make the data, and columns of a block
CASES = [("MLP", 1, 1), ("MLP", 16, 1), ("MLP", 1, 8), ("ResNet-20", 1, 1)]
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
    for name, batches, columns in CASES:
        torch.manual_seed(0)
        model, X, y = problems.PROBLEMS[name]()
        if batches == 1:
            share = [(X.chunk(size)[rank], y.chunk(size)[rank])]
        else:
            share = [(X.roll(i, 0), y.roll(i, 0)) for i in range(batches)][rank::size]
        what = f"{name}, {batches * len(X):,} samples"
        what += f", {columns} columns" if columns > 1 else ""
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
                    v = torch.randn(A.shape[0], columns)
                    times, talks = [], []
                    for i in range(WARM_UP + rounds):
                        sent.nbytes, sent.seconds = 0, 0.0
                        began = time.perf_counter()
                        A @ v
                        if i >= WARM_UP:
                            times.append(time.perf_counter() - began)
                            talks.append(sent.seconds)
                    found[f"{kind}, {what}"] = {
                        "seconds": statistics.median(times),
                        "talk": statistics.median(talks),
                        "nbytes": sent.nbytes,
                        "vector": v.nbytes,
                    }
    found["constants"] = network(rounds) | (language_model() if size == 1 else {})
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


def language_model() -> dict[str, float]:
    """What the outlook needs of a transformer with nothing kept, measured on the GPT."""
    torch.manual_seed(0)
    model, X, y = problems.gpt()
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    data = [(X, y)]
    once = HessianLinearOperator(model, loss, params, data, cache=False)
    kept = HessianLinearOperator(model, loss, params, data)
    v = torch.randn(once.shape[0])
    kept @ v
    times: dict[str, list[float]] = {"gradient": [], "product": []}
    for _ in range(5):
        for name, run in (
            ("gradient", lambda: torch.autograd.grad(loss(model(X), y), params)),
            ("product", lambda: once @ v),
        ):
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        "gradients": medians["product"] / medians["gradient"],
        # of a token's graph, and how it grows with width times depth
        "graph": kept._maps.nbytes / X.numel() / len(v) ** (2 / 3),
    }


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
        "| | ranks | ms a product | speed-up | efficiency | of it in messages, ms "
        "| bytes in messages | of the vectors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    one = found[min(found)]
    for case in one:
        if case == "constants":
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
    """An accelerator and its network: what makers state, not measured here."""

    name = "80 GB and 400 TFLOP/s a rank, 25 GB/s and 10 microseconds between ranks"
    memory, flops, bandwidth, latency = 80e9, 4e14, 25e9, 1e-5


#: of all data, in one product; and of one sequence, which is one batch
TOKENS, SEQUENCE = 2**20, 2048


def outlook(gradients: float, graph: float) -> list[str]:
    """Return the table of what is computed, for language models in two bytes a parameter.

    Parameters
    ----------
    gradients
        What a Hessian product costs with nothing kept.
    graph
        Bytes of a token's graph, over the number of parameters to the power 2/3.
    """
    lines = [
        "| parameters | ranks | memory of a rank, GB | compute, s | messages, s "
        "| product, s | efficiency | in the way |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for parameters in (1e8, 1e9, 7e9, 70e9):
        # the vector, the message with it, the contribution and the message with that
        vectors = 4 * 4 * parameters
        memory = 2 * parameters + vectors + graph * SEQUENCE * parameters ** (2 / 3)
        for ranks in (1, 8, 64, 512):
            # a gradient takes six operations for each parameter and token
            compute = gradients * 6 * parameters * TOKENS / ranks / Machine.flops
            # a broadcast moves the vector once, an all-reduce nearly twice
            share = (ranks - 1) / ranks
            messages = 3 * share * 4 * parameters / Machine.bandwidth
            messages += 3 * (ranks - 1) * Machine.latency
            trouble = "messages" if messages > compute else ""
            if memory > Machine.memory:
                trouble = "memory" + (", by vectors" if vectors > Machine.memory else "")
            product = compute + messages
            lines.append(
                f"| {parameters / 1e9:g} billion | {ranks} | {memory / 1e9:.0f} "
                f"| {compute:.2f} | {messages:.2f} | {product:.2f} "
                f"| {compute / product:.0%} | {trouble} |"
            )
    return lines


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
    largest, one = found[max(found)]["constants"], found[1]["constants"]
    text = [
        f"Measured with torch {torch.__version__}, gloo, {platform.machine()}, "
        f"{os.cpu_count()} cores, float32, one thread a process; medians of "
        f"{options.rounds} products.",
        "",
        *scaling(found),
        "",
        f"Measured as well: an all-reduce of one number on {max(found)} ranks takes "
        f"{1e6 * largest['latency']:.0f} microseconds, one of 16 MB goes on at "
        f"{largest['bandwidth'] / 1e9:.2f} GB/s; on the GPT a Hessian product with nothing "
        f"kept takes {one['gradients']:.1f} gradients, and the graph of a token "
        f"{one['graph']:.2f} bytes times the number of parameters to the power 2/3.",
        "",
        f"Computed, not measured: {Machine.name}; {TOKENS:,} tokens in all.",
        "",
        *outlook(one["gradients"], one["graph"]),
    ]
    print("\n".join(text))
    if options.output:
        options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
