"""Memory of a Krylov basis whose vectors are whole, or sharded over processes.

Starts itself on several numbers of processes. The model's parameters are sharded by
``fully_shard``; a Lanczos iteration written in torch multiplies with its Hessian, and keeps
every vector. Printed is what a process keeps, and how much its memory grows meanwhile.

    python docs/benchmarks/sharded.py [--ranks 1 2 4] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchlinop import HessianLinearOperator

import problems

#: vectors of the basis
VECTORS = 64
MEBIBYTE = 2**20
NEWLINE = "\n"


# ------------------------------------------------------------------------ on a rank


def measure(folder: str) -> None:
    """Run Lanczos with both kinds of vectors; every rank writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    model, X, y = problems.mlp()
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    H = HessianLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X.chunk(size)[rank], y.chunk(size)[rank])],
        process_group=dist.group.WORLD,
    )
    start = torch.ones(H.shape[0]) / H.shape[0] ** 0.5
    for _ in range(12):  # linearizations are made and ways to multiply are tried
        H @ distribute_tensor(start, mesh, [Shard(0)])
    found: dict[str, Any] = {
        "dim": H.shape[0],
        "parameters": sum(p.to_local().nbytes for p in model.parameters()),
    }
    for kind in ("whole", "sharded"):
        before = _reset_peak()
        value, nbytes = lanczos(H, start, mesh if kind == "sharded" else None)
        found[kind] = {
            "value": value,
            "basis": nbytes,
            "growth": _memory("VmHWM") - before,
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def lanczos(
    H: HessianLinearOperator, start: Tensor, mesh: DeviceMesh | None
) -> tuple[float, int]:
    """Return the largest eigenvalue, and bytes of the basis that this rank keeps."""

    def product(q: Tensor) -> Tensor:
        if mesh is None:
            return H @ q
        vector = DTensor.from_local(
            q, mesh, [Shard(0)], run_check=False, shape=start.shape, stride=(1,)
        )
        return (H @ vector).to_local()

    def added(x: Tensor) -> Tensor:
        if mesh is not None:
            dist.all_reduce(x)
        return x

    q = start
    if mesh is not None:
        q = distribute_tensor(start, mesh, [Shard(0)]).to_local()
    basis = q.new_empty(VECTORS, len(q))
    projected = torch.zeros(VECTORS, VECTORS)
    for j in range(VECTORS):
        basis[j] = q
        w = product(q)
        known = basis[: j + 1]
        for _ in range(2):
            coefficients = added(known @ w)
            w -= coefficients @ known
            projected[: j + 1, j] += coefficients
        q = w / added(w.square().sum()).sqrt()
    # what is above the diagonal counts: below it, the norms are not stored
    values = torch.linalg.eigvalsh(projected, UPLO="U")
    return values[-1].item(), basis.nbytes


def _memory(name: str) -> int:
    """Return a figure that Linux has of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


# --------------------------------------------------------------------------- table


def start_on(ranks: int) -> list[dict[str, Any]]:
    """Run :func:`measure` on several ranks; return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", __file__, "--on-rank", folder]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        subprocess.run(command, check=True, env=os.environ | threads)
        paths = sorted(Path(folder).iterdir())
        return [json.loads(path.read_text()) for path in paths]


def table(found: dict[int, list[dict[str, Any]]]) -> list[str]:
    """Return what was measured, of the rank that has most."""
    lines = [
        "| vectors | ranks | parameters, MiB | basis, MiB | growth of memory, MiB "
        "| largest eigenvalue |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("whole", "sharded"):
        for ranks, each in sorted(found.items()):
            parameters = max(its["parameters"] for its in each) / MEBIBYTE
            basis = max(its[kind]["basis"] for its in each) / MEBIBYTE
            growth = max(its[kind]["growth"] for its in each) / MEBIBYTE
            value = each[0][kind]["value"]
            lines.append(
                f"| {kind} | {ranks} | {parameters:.1f} | {basis:.1f} | {growth:.1f} "
                f"| {value:.5f} |"
            )
    return lines


def page(found: dict[int, list[dict[str, Any]]]) -> str:
    """Return the page with the table."""
    dim = next(iter(found.values()))[0]["dim"]
    vector = f"{4 * dim / MEBIBYTE:.1f} MiB"
    made = f"torch {torch.__version__}, gloo, {platform.machine()}"
    return f"""---
html_theme.sidebar_secondary.remove: true
---

# Sharded vectors

Made by `python docs/benchmarks/sharded.py`: {made}.

The Hessian of a network of {dim:,} parameters in float32 ({vector} a vector),
sharded by `fully_shard`; {VECTORS} steps of Lanczos that keep every vector. All figures are
those of the process that has most. *Parameters* is its part of them. *Growth* is the
highest memory during the iteration less the memory before it: the basis, and the few whole
vectors of one product.

{NEWLINE.join(table(found))}

Not in it, and the same for each number of ranks: the whole parameters that
linearizations are made of, as large as one whole vector.
"""


def main() -> None:
    """Print the table, or measure on one rank of several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--on-rank")
    arguments = parser.parse_args()
    if arguments.on_rank:
        measure(arguments.on_rank)
        return
    found = {ranks: start_on(ranks) for ranks in arguments.ranks}
    text = page(found)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
