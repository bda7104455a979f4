"""Kronecker factors, dampings, products of the inverse, memory, preconditioners; the peer.

Each problem runs in one process, interleaved, on the CPU with two threads, and gives rows
of medians in gradients of the same loss. Peak memory is taken in processes of their own;
products with preconditioners are counted. Pieces are kept in a folder and put together:

    python docs/benchmarks/kronecker.py --folder FOLDER [--piece NAME] [--rounds 3]
    python docs/benchmarks/kronecker.py --folder FOLDER --output kronecker.md

What stands below "## What the figures say" in the output is kept.
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
    changes, times = medians(change, rounds), medians(product, 3 * rounds)
    alone = {who: changes[who] - times[who] for who in times if who != "gradient"}
    rows = [
        _row(f"another damping and a product, {name}", changes),
        _row(f"the damping alone (difference), {name}", {**times, **alone}),
        _row(f"product of the inverse, {name}", times),
    ]
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


# ------------------------------------------------------------------ preconditioners


def digits(steps: int | None, decay: float) -> tuple[nn.Module, tuple, Tensor]:
    """Train on 900 digits by Adam or L-BFGS: model, data, gradient of the other digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(params, lr=1e-2)
    if steps is None:
        options: dict = {"max_iter": 500, "tolerance_grad": 1e-9}
        optimizer = torch.optim.LBFGS(params, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(X[:900]), y[:900])
        value = value + decay / 2 * sum(p.square().sum() for p in params)
        value.backward()
        return value

    for _ in range(steps or 1):
        optimizer.step(closure)
    others = torch.autograd.grad(loss(model(X[900:]), y[900:]), params)
    return model, (X[:900], y[:900]), torch.cat([g.reshape(-1) for g in others])


def preconditioners() -> list[str]:
    """A table of products of conjugate gradients to a relative residual of 1e-5."""
    lines = [
        "| digits network | samples that count | damping | plain | KFAC | KFAC, heuristic "
        "| KFAC, separate biases | EKFAC | KFOC | exact blocks | Nyström |",
        "| --- " * 11 + "|",
    ]
    states = [
        ("20 steps of Adam", 20, 0.0),
        ("60 steps", 60, 0.0),
        ("300 steps", 300, 0.0),
        ("optimum for decay 1e-2", None, 1e-2),
        ("optimum for decay 1e-3", None, 1e-3),
    ]
    loss = nn.CrossEntropyLoss()
    for title, steps, decay in states:
        model, data, b = digits(steps, decay)
        arguments = model, loss, list(model.parameters()), [data]
        with torch.no_grad():
            value = loss(model(data[0]), data[1]).item()
            p = model(data[0]).softmax(-1)
        w = (p - p.square()).sum(-1)
        count = (w.sum().square() / w.square().sum()).item()
        G = torchlinop.GGNLinearOperator(*arguments)
        blocks = layers_of(G)
        K, separate = (KFACLinearOperator(*arguments, joint_bias=j) for j in (True, False))
        E = torchlinop.EKFACLinearOperator(*arguments)
        O = torchlinop.KFOCLinearOperator(*arguments)  # noqa: E741
        for d in (1e-2, 1e-3, 1e-4, 1e-5):
            inverses = [
                None,
                K.inverse(damping=d),
                K.inverse(damping=d, strategy="heuristic"),
                separate.inverse(damping=d),
                E.inverse(damping=d),
                O.inverse(damping=d),
                torchlinop.aslinearoperator(
                    torch.linalg.inv(blocks + d * torch.eye(len(b)))
                ),
                torchlinop.NystromPreconditioner(G, d),
            ]
            counts = [products(G, d, b, M) for M in inverses]
            first = f"{title} (loss {value:.2f}) | {count:.0f}" if d == 1e-2 else "|"
            lines.append(f"| {first} | {d:.0e} | {' | '.join(map(str, counts))} |")
    return lines


def layers_of(G: torchlinop.GGNLinearOperator) -> Tensor:
    """The dense blocks of the two layers, weights and biases together."""
    dense, first = G.to_dense(), sum(G.space.sizes[:2])
    blocks = torch.zeros_like(dense)
    for part in (slice(0, first), slice(first, None)):
        blocks[part, part] = dense[part, part]
    return blocks


def products(G: torchlinop.GGNLinearOperator, damping: float, b: Tensor, M: object) -> int:
    """How many products of the matrix a solve needs."""
    inverse = torchlinop.CGInverseLinearOperator(G, damping=damping, rtol=1e-5, M=M)
    inverse @ b
    assert inverse.last_solve is not None
    return inverse.last_solve.num_matvecs


def _peer() -> str:
    name = "curvlinops-for-pytorch"
    return f"{name} {importlib.metadata.version(name)}" if PEER else "no curvlinops"


# -------------------------------------------------------------------------- the page

MEMORY = "memory"
PRECONDITIONERS = "preconditioners"
_NOTES = "## What the figures say"


def made(piece: str, rounds: int) -> list[str]:
    """Compute one piece of the page."""
    if piece == MEMORY:
        lines = []
        for _ in range(rounds):
            both = {what: peak(what) for what in ("gradient", "factors")}
            quotient = both["factors"] / both["gradient"]
            lines.append(
                f"| {both['gradient']:.0f} | {both['factors']:.0f} | {quotient:.2f} |"
            )
        return [
            "| gradient, MiB | factors, MiB | quotient |",
            "| --- | --- | --- |",
            *lines,
        ]
    if piece == PRECONDITIONERS:
        return preconditioners()
    name, _, fisher_type = piece.rpartition(" ")
    return factors(name, fisher_type, rounds)


def page(folder: Path, old: str) -> str:
    """Put the pieces together."""

    def piece(name: str) -> str:
        path = folder / f"{name}.md"
        return path.read_text() if path.exists() else ""

    times = "".join(piece(" ".join(pair)) for pair in FACTORS)
    return f"""# Kronecker factors

Printed by `docs/benchmarks/kronecker.py`, piece by piece.
{(folder / "machine").read_text()}

KFAC of all weights and biases of linear layers and convolutions, float32, medians; times in
gradients of the same loss. Factors are those of a risk that has been looked at: which
dimension counts the samples is known, as the peer is told. The peer uses its exact damping.
The quotient is the peer's time over ours.

| | gradient, ms | torchlinop | curvlinops | quotient |
| --- | --- | --- | --- | --- |
{times}
Peak memory of a language model (vocabulary 50,304, 512 tokens, Monte Carlo, parameters of
the blocks), in several runs:

{piece(MEMORY)}
Products of conjugate gradients with the damped GGN, to a relative residual of 1e-5 in
float64; the right-hand side is the gradient of other samples. *Samples that count* is the
number of samples of equal curvature that would weigh as much; *exact blocks* inverts the
GGN's own blocks of both layers (products that make them or Nyström's sketch do not count).

{piece(PRECONDITIONERS)}
{_NOTES}{old.partition(_NOTES)[2]}"""


def main() -> None:
    """Compute a piece, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [" ".join(pair) for pair in FACTORS] + [MEMORY, PRECONDITIONERS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--piece", choices=names, help="by default all are made")
    parser.add_argument("--folder", type=Path, help="where pieces are kept")
    parser.add_argument("--output", type=Path, help="write the page from the folder")
    parser.add_argument("--memory", choices=["gradient", "factors"])
    given = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    if given.memory:
        print(memory(given.memory))
        return
    if given.output:
        old = given.output.read_text() if given.output.exists() else ""
        given.output.write_text(page(given.folder, old))
        return
    for name in [given.piece] if given.piece else names:
        text = "".join(f"{line}\n" for line in made(name, given.rounds))
        print(text, end="", flush=True)
        if given.folder:
            given.folder.mkdir(parents=True, exist_ok=True)
            (given.folder / f"{name}.md").write_text(text)
            (given.folder / "machine").write_text(
                f"torch {torch.__version__}, torchlinop {torchlinop.__version__}, "
                f"{_peer()}, {platform.machine()}, 2 threads."
            )


if __name__ == "__main__":
    main()
