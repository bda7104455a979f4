"""Long runs on a matrix, and a script in which each of them is killed.

    python -m tests.surviving.runs FOLDER

Processes are forked from one that has imported everything, and end by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchlinop
from scipy.sparse.linalg import cg, eigsh
from torch import Tensor
from torchlinop import (
    CGInverseLinearOperator,
    Checkpoint,
    MINRESInverseLinearOperator,
    ParameterSpace,
    TorchLinearOperator,
    estimate,
)

N = 120
EIGENVALUES = np.geomspace(1e-2, 10, N)
#: products after which a run is killed
KILLED = 30


def dense() -> np.ndarray:
    """The matrix, by NumPy."""
    V, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((N, N)))
    matrix = V * EIGENVALUES @ V.T
    return (matrix + matrix.T) / 2


class Counted(TorchLinearOperator):
    """The matrix, with something that is done at one of its products."""

    def __init__(
        self, last: int = 10**9, end: Callable[[], Any] = lambda: None, shift: float = 0.0
    ) -> None:
        super().__init__((N, N), torch.float64, torch.device("cpu"))
        self.matrix = torch.from_numpy(dense() + shift * np.eye(N))
        self.count, self.last, self.end = 0, last, end

    def _apply(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count == self.last:
            self.end()
        return self.matrix @ x

    def _adjoint(self) -> TorchLinearOperator:
        return self


def right_hand_sides(count: int) -> np.ndarray:
    """Of which the last one is a combination of others, where there are several."""
    B = np.random.default_rng(3).standard_normal((N, count))
    if count > 2:
        B[:, -1] = B[:, 0] - B[:, 1]
    return B


def _density(A: TorchLinearOperator, file: Checkpoint) -> np.ndarray:
    p = estimate.spectral_density(A, num_probes=3, num_steps=45, checkpoint=file)
    return p.density(np.linspace(0, 10, 20))


def _layers(A: TorchLinearOperator, file: Checkpoint) -> np.ndarray:
    space = ParameterSpace({"a.weight": torch.zeros(50), "b.weight": torch.zeros(70)})
    densities = estimate.layer_densities(
        A, space=space, num_probes=2, num_steps=20, checkpoint=file
    )
    return np.stack([p.density(np.linspace(0, 10, 20)) for p in densities.values()])


def _scipy_eigsh(A: TorchLinearOperator, file: Checkpoint) -> np.ndarray:
    with torchlinop.monitor(A, checkpoint=file) as log:
        return eigsh(A, k=5, tol=1e-10, v0=log.v0(5), return_eigenvectors=False)


def _scipy_cg(A: TorchLinearOperator, file: Checkpoint) -> np.ndarray:
    b = right_hand_sides(1)[:, 0]
    with torchlinop.monitor(A, checkpoint=file) as log:
        return cg(A, b, atol=1e-9, x0=log.x0(b))[0]


#: a function of a matrix and a checkpoint, and its answer; None: that of an undisturbed run
RUNS: dict[str, Callable[[TorchLinearOperator, Checkpoint], Any]] = {
    "eigsh": lambda A, file: estimate.eigsh(
        A, k=5, tol=1e-8, ncv=20, checkpoint=file
    ).eigenvalues.numpy(),
    "density": _density,
    "layers": _layers,
    "cg": lambda A, file: (
        CGInverseLinearOperator(A, rtol=1e-9, checkpoint=file) @ right_hand_sides(1)[:, 0]
    ),
    "block cg": lambda A, file: (
        CGInverseLinearOperator(A, rtol=1e-9, checkpoint=file) @ right_hand_sides(3)
    ),
    "minres": lambda A, file: (
        MINRESInverseLinearOperator(A, rtol=1e-9, checkpoint=file) @ right_hand_sides(3)
    ),
    "scipy eigsh": _scipy_eigsh,
    "scipy cg": _scipy_cg,
}


def kill() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_while_writing(path: Path) -> None:
    """Kill when a new file is whole, but not in its place yet."""
    replace, written = os.replace, []

    def kill_at_last(*args: Any) -> None:
        written.append(args)
        if len(written) == KILLED:
            kill()
        replace(*args)

    os.replace = kill_at_last
    RUNS["eigsh"](Counted(), Checkpoint(path, seconds=0))


def main(folder: Path) -> None:
    """Start each run with a file of its own, and kill it."""
    torch.set_num_threads(1)
    jobs = {name: lambda name=name: _kill_after(name, folder / name) for name in RUNS}
    jobs["writing"] = lambda: _kill_while_writing(folder / "writing")
    for name, job in jobs.items():
        child = os.fork()
        if not child:
            job()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", sep=": ")


def _kill_after(name: str, path: Path) -> None:
    RUNS[name](Counted(KILLED, kill), Checkpoint(path, seconds=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
