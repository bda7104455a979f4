"""The Hessian of a digits classifier whose data is spread over processes.

    torchrun --nproc-per-node=2 docs/examples/distributed.py

Every process holds a share of the 1,500 digits. Rank 0 runs SciPy's eigsh and a trace
estimator, the others serve it; then all know the results, and rank 0 compares them with
those of one process that holds all of the data.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torchlinop
from scipy.sparse.linalg import eigsh
from torch import nn
from torchlinop import HessianLinearOperator, TorchLinearOperator, estimate
from torchlinop.examples.digits import train


def largest_and_trace(H: TorchLinearOperator) -> tuple[np.ndarray, float]:
    """Three largest eigenvalues, and an estimate of the trace."""
    start = np.ones(H.shape[0])
    values = eigsh(H, k=3, which="LA", v0=start, return_eigenvectors=False)
    return values, float(estimate.trace(H, num_matvecs=50, seed=0).value)


def main() -> None:
    """Run on this rank."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, batches, _ = train()
    for p in model.parameters():  # processes may round differently while they train
        dist.broadcast(p.data, 0)
    loss, share = nn.CrossEntropyLoss(), batches[rank::size]

    group = dist.group.WORLD
    H = HessianLinearOperator(model, loss, model.parameters(), share, process_group=group)
    found = None
    with torchlinop.distributed.driver(H) as A:
        if A is not None:
            found = largest_and_trace(A)
    values, trace = torchlinop.distributed.broadcast(found)
    print(f"rank {rank} of {size}: eigenvalues {values.round(4)}, trace {trace:.4f}")

    if rank == 0:
        whole = HessianLinearOperator(model, loss, model.parameters(), batches)
        expected, its_trace = largest_and_trace(whole)
        difference = max(abs(values - expected).max(), abs(trace - its_trace))
        print(f"difference from one process: {difference:.1e}")
        assert difference < 1e-9 * abs(trace)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
