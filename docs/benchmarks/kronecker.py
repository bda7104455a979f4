"""Kronecker factors, another damping, one product of the inverse, memory; and the peer.

Everything runs in one process, interleaved, on the CPU with two threads; a table of medians
in gradients of the same loss is printed and written. Peak memory is taken in processes of
their own.

    python docs/benchmarks/kronecker.py [--rounds 3] [--output docs/benchmarks/kronecker.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchlinop
from torch import Tensor, nn
from torchlinop import EmpiricalRisk, KFACLinearOperator

import problems

PEER = importlib.util.find_spec("curvlinops") is not None
#: problem, Fisher type
FACTORS = [
    ("tiny MLP", "type-2"),
    ("MLP", "type-2"),
    ("ResNet-20", "type-2"),
    ("MLP", "mc"),
    ("ResNet-20", "mc"),
    ("GPT", "mc"),
]


def weights_of_layers(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of linear layers and convolutions, for which the peer has factors."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [p for layer in layers for p in layer.parameters()]


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median times of calls in turn, after one call of each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name in functions:
        functions[name]()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def peers_factors(arguments: tuple, fisher_type: str, terms: int) -> object:
    """Let the peer compute its factors."""
    import curvlinops

    K = curvlinops.KFACLinearOperator(
        *arguments,
        fisher_type=fisher_type,
        check_deterministic=False,
        separate_weight_and_bias=False,
        num_data=len(arguments[-1][0][0]),
        num_per_example_loss_terms=terms,
    )
    K @ torch.ones(K.shape[1])  # factors are computed in the first product
    return K


def factors(name: str, fisher_type: str, rounds: int) -> list[str]:
    """Rows of the table for one problem."""
    torch.manual_seed(0)
    model, X, y = problems.PROBLEMS[name]()
    loss, params, data = nn.CrossEntropyLoss(), weights_of_layers(model), [(X, y)]
    arguments = model, loss, params, data
    risk = EmpiricalRisk(*arguments, check_deterministic=False)
    v = torch.ones(risk.space.dim)

    def ours() -> KFACLinearOperator:
        K = KFACLinearOperator(risk, fisher_type=fisher_type)
        K @ v
        return K

    functions: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(loss(model(X), y), params),
        "torchlinop": ours,
    }
    if PEER:
        terms = len(y) // len(X)
        functions["curvlinops"] = lambda: peers_factors(arguments, fisher_type, terms)
    times = medians(functions, rounds)
    rows = [_row(f"factors and a product, {name}, {fisher_type}", times)]
    if fisher_type == "type-2" and name != "tiny MLP":
        rows += inverses(name, functions, v, rounds)
    return rows


def inverses(
    name: str, functions: dict[str, Callable[[], object]], v: Tensor, rounds: int
) -> list[str]:
    """Rows of the table for inverses: another damping, one product."""
    dampings = iter(1e-3 * 1.1**i for i in range(10_000))
    K = functions["torchlinop"]()
    assert isinstance(K, KFACLinearOperator)
    start = time.perf_counter()
    inverse = K.inverse(damping=1e-3)
    first = time.perf_counter() - start
    change: dict[str, Callable[[], object]] = {
        "gradient": functions["gradient"],
        "torchlinop": lambda: K.inverse(damping=next(dampings)) @ v,
    }
    product: dict[str, Callable[[], object]] = {
        "gradient": functions["gradient"],
        "torchlinop": lambda: inverse @ v,
    }
    if PEER:
        import curvlinops

        theirs = functions["curvlinops"]()

        def invert() -> object:
            return curvlinops.KFACInverseLinearOperator(
                theirs, damping=next(dampings), use_exact_damping=True
            )

        fixed = invert()
        change["curvlinops"] = lambda: invert() @ v  # type: ignore[operator]
        product["curvlinops"] = lambda: fixed @ v  # type: ignore[operator]
    rows = [_row(f"another damping and a product, {name}", medians(change, rounds))]
    times = medians(product, 3 * rounds)
    rows.append(_row(f"product of the inverse, {name}", times))
    share = first / times["gradient"]
    rows.append(f"| first inverse (decompositions), {name} | | {share:.2f} | | |")
    return rows


def _row(title: str, times: dict[str, float]) -> str:
    unit = times["gradient"]
    ours = times["torchlinop"] / unit
    theirs, quotient = "", ""
    if "curvlinops" in times:
        theirs = f"{times['curvlinops'] / unit:.2f}"
        quotient = f"{times['curvlinops'] / times['torchlinop']:.2f}"
    return f"| {title} | {1e3 * unit:.1f} | {ours:.2f} | {theirs} | {quotient} |"


# --------------------------------------------------------------------------- memory


def language_model() -> tuple[nn.Module, Tensor, Tensor, list[nn.Parameter]]:
    """GPT with a vocabulary of 50,304 on 512 tokens; parameters within the blocks."""
    torch.manual_seed(0)
    model = problems._GPT(vocabulary=50304, length=256, width=256, depth=4).eval()
    tokens = torch.randint(50304, (2, 256))
    params = [p for n, p in model.named_parameters() if n.startswith("blocks")]
    return model, tokens, torch.randint(50304, (512,)), params


def peak(what: str) -> float:
    """MiB that a computation adds to the memory of a process of its own."""
    command = [sys.executable, __file__, "--memory", what]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


def memory(what: str) -> float:
    """MiB that a gradient or the factors add, in this process."""
    model, X, y, params = language_model()
    loss = nn.CrossEntropyLoss()
    hidden = model.blocks(torch.rand(1, 256, 256)).sum()
    torch.autograd.grad(hidden, params)  # the libraries' own buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "gradient":
        torch.autograd.grad(loss(model(X), y), params)
    else:
        risk = EmpiricalRisk(model, loss, params, [(X, y)], check_deterministic=False)
        KFACLinearOperator(risk, fisher_type="mc")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _peer() -> str:
    name = "curvlinops-for-pytorch"
    return f"{name} {importlib.metadata.version(name)}" if PEER else "no curvlinops"


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="a problem's name")
    parser.add_argument("--memory", choices=["gradient", "factors", "both"])
    given = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    if given.memory in ("gradient", "factors"):
        print(memory(given.memory))
        return
    lines = [
        f"torch {torch.__version__}, torchlinop {torchlinop.__version__}, {_peer()}, "
        f"{platform.machine()}, 2 threads, medians of {given.rounds} rounds; times in "
        "gradients of the same loss.",
        "",
        "| | gradient, ms | torchlinop | curvlinops | quotient |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, fisher_type in FACTORS if given.memory is None else []:
        if given.only in (None, name):
            lines += factors(name, fisher_type, given.rounds)
            print("\n".join(lines[-3:]), flush=True)
    if given.only is None:
        both = {what: peak(what) for what in ("gradient", "factors")}
        lines += [
            "",
            "Peak memory of a language model (vocabulary 50,304, 512 tokens, Monte Carlo): "
            f"gradient {both['gradient']:.0f} MiB, factors {both['factors']:.0f} MiB "
            f"({both['factors'] / both['gradient']:.2f} gradients).",
        ]
    text = "\n".join(lines)
    print(text)
    if given.output:
        command = (
            "python docs/benchmarks/kronecker.py --output docs/benchmarks/kronecker.md"
        )
        given.output.write_text(f"# Kronecker factors\n\n`{command}`\n\n{text}\n")


if __name__ == "__main__":
    main()
