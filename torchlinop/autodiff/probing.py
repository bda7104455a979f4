"""The vector at which linear maps are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_vector(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return always the same random vector.

    Linear maps that agree on it are the same, but for a choice of probability zero.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    # made on the host: not every device has a generator of its own
    probe = torch.rand(dim, generator=generator, dtype=dtype, device="cpu")
    return probe.sub_(0.5).to(device)
