"""Whether tensors are the same on every rank, without sending them."""

from __future__ import annotations

import torch
from torch import Tensor

#: lanes of a checksum; a prime, so that rows of a matrix fall into different lanes
_LANES = 1021
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Return a 0-dimensional int64 tensor, on the same device, of the bits in their order.

    The same bits have the same checksum on every device.

    Examples
    --------
    >>> import torch
    >>> x = torch.arange(3.0)
    >>> bool(checksum(x) == checksum(x.clone())), bool(checksum(x) == checksum(x.flip(0)))
    (True, False)
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    whole = bits.numel() // _LANES * _LANES
    lanes = bits[:whole].view(-1, _LANES)
    rest = bits[whole:]
    parts = (lanes.sum(0, dtype=torch.int64), lanes.sum(1, dtype=torch.int64), rest)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for i, part in enumerate(parts):
        weights = torch.arange(1, part.numel() + 1, device=flat.device)
        # odd, so that no bit is lost, and far from one another
        weights = (2 * weights + i) * 0x5851F42D4C957F2D + 1
        weights |= 1
        total = total + (part.to(torch.int64) * weights).sum()
    return total
