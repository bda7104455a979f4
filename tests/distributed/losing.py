"""What ranks say when another one is gone: written to a file by each that is left."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchlinop import GGNLinearOperator, HessianLinearOperator
from torchlinop.distributed import LostRankError, driver

from tests.distributed import checking
from tests.distributed.mishaps import Mishap, built
from tests.distributed.problems import data, loss, share


def killed(H, m, rank, size):
    """Rank 1 is killed in the middle of a product."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end the others at once
    if rank == 1:
        m.happening = lambda: os.kill(os.getpid(), signal.SIGKILL)
    with driver(H) as A:
        if A is not None:
            A @ torch.ones(A.shape[0], dtype=torch.float64)


def late(H, m, rank, size):
    """Rank 1 takes longer than the group waits."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ones = torch.ones(H.shape[0], dtype=torch.float64)
    H @ ones  # what takes time once is over
    impatient = dist.new_group(range(size), timeout=timedelta(seconds=3))
    own = share(data(), rank, size)
    G = GGNLinearOperator(
        m, loss(), m.parameters(), own, cache=False, process_group=impatient
    )
    G @ ones
    seconds = [6]
    if rank == 1:  # once, of several times that the model is evaluated
        m.happening = lambda: time.sleep(seconds.pop() if seconds else 0)
    G @ ones


def interrupted(H, m, rank, size):
    """Somebody presses Ctrl-C."""
    (Path(sys.argv[1]) / f"{rank}.ready").write_text(str(os.getpid()))
    with driver(H) as A:
        while A is not None:
            A @ torch.ones(A.shape[0], dtype=torch.float64)


def main():
    folder, name = sys.argv[1:3]
    rank, size = checking.start()
    m = Mishap()
    H = built(HessianLinearOperator, m, rank, size, cache=False)
    try:
        {"killed": killed, "late": late, "interrupted": interrupted}[name](H, m, rank, size)
        said = ["nothing", []]
    except LostRankError as error:
        said = [str(error), error.ranks]
    except KeyboardInterrupt:
        said = ["interrupted", []]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    os._exit(1)  # the group may be broken


if __name__ == "__main__":
    main()
