"""How much memory there is."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

#: share of the free memory that is used by default
_MEMORY_SHARE = 0.5


def free_memory(device: torch.device) -> float:
    """Return the default budget in bytes: a share of what is free on the device."""
    return _MEMORY_SHARE * available_memory(device)


def available_memory(device: torch.device) -> float:
    """Bytes that are free on the device, or on the host for any but CUDA devices."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    # in the third line; unbuffered and undecoded, since operators ask in a first product
    with suppress(OSError), open("/proc/meminfo", "rb", buffering=0) as info:
        _, found, rest = info.read(256).partition(b"MemAvailable:")
        if found:
            return 1024.0 * int(rest.split()[0])
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(4 << 30)
