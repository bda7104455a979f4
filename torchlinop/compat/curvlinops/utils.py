"""curvlinops' utilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def allclose_report(
    tensor1: Tensor | np.ndarray,
    tensor2: Tensor | np.ndarray,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> bool:
    """Whether two arrays are close; prints where and by how much they are not.

    Parameters
    ----------
    tensor1, tensor2
        Arrays of one shape. The second is the reference of the relative tolerance.
    rtol, atol
        As for :func:`torch.allclose`.
    """
    first = torch.as_tensor(tensor1)
    second = torch.as_tensor(tensor2, device=first.device)
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(dtype), second.to(dtype)
    differs = ~torch.isclose(first, second, rtol=rtol, atol=atol)
    if not differs.any():
        return True
    for index in differs.nonzero().tolist():
        a, b = first[tuple(index)].item(), second[tuple(index)].item()
        print(f"{index}: {a:.6e} and {b:.6e}, difference {a - b:.1e}")
    print(
        f"{int(differs.sum())} of {first.numel()} entries differ by more than "
        f"{atol} + {rtol} * |reference|; largest entries {first.abs().max():.6e} and "
        f"{second.abs().max():.6e}."
    )
    return False
