"""Numbers that tell batches apart: by their leading entries, or by all that they hold.

A row of a tensor is hashed as ``sum_j key_j * word_j`` over its 64-bit words, modulo
2**64, followed by a mixing step without which the sum over samples would be that of the
columns. All is integer arithmetic of torch, so the tensors stay where they are.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinop.data.batches import Batch
from torchlinop.data.objects import plain_values

#: words of a row that are hashed with one table of keys
_WORDS = 1024
#: words at a time, so that the temporaries are small
_BLOCK = 1 << 16
_SEED = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))


@dataclass(frozen=True)
class Content:
    """All that a batch holds, as numbers.

    Attributes
    ----------
    digests
        One for each tensor, the last for everything that is no tensor.
    shapes
        Type and shape of a row of each tensor.
    samples
        Number of samples, or None where rows of the tensors are not samples.
    total
        The sum over the samples, which is the same for each order and each cut into
        the same number of batches.
    """

    digests: tuple[int, ...]
    shapes: tuple[str, ...]
    samples: int | None
    total: int


def leading(batch: Batch) -> int:
    """Return a number that tells batches apart by shapes and leading entries."""
    digest = 0
    for tensor in batch.sources:
        shape = "nested" if tensor.is_nested else tuple(tensor.shape)
        digest = zlib.crc32(repr((shape, tensor.dtype)).encode(), digest)
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            continue
        head = (
            _resolved(tensor)
            .reshape(-1)[:256]
            .cpu()
            .clone(memory_format=torch.contiguous_format)
        )
        digest = zlib.crc32(head.view(torch.uint8).numpy().tobytes(), digest)
    return digest


def content(batch: Batch) -> Content:
    """Read all of a batch."""
    facts: list[Any] = list(plain_values((batch.X, batch.y)))
    hashes: list[Tensor] = []
    shapes: list[str] = []
    rows: list[Tensor] = []  # of the tensors that have a row for each sample
    known = True
    for tensor in batch.sources:
        shape = "nested" if tensor.is_nested else tuple(tensor.shape[1:])
        shapes.append(f"{tensor.dtype}, {shape}")
        parts = [_rows(part) for part in _strided_parts(tensor)]
        hashes.append(_hash(torch.cat(parts).unsqueeze(0)))
        if tensor.layout != torch.strided or tensor.is_nested:
            known = False
        elif tensor.ndim == 0:
            facts.append(int(hashes[-1]))
        else:
            rows += parts
    digests = [int(h) for h in hashes]
    common = zlib.crc32(repr(facts).encode())
    known = known and len({len(r) for r in rows}) == 1
    total = _mixed_number(common)
    if known:
        of_samples = _hash(torch.stack([r.to(rows[0].device) for r in rows], dim=1))
        total += int(of_samples.sum())
    samples = len(rows[0]) if known else None
    return Content((*digests, common), tuple(shapes), samples, total % (1 << 64))


def total(contents: Sequence[Content]) -> tuple[int, int] | None:
    """Return numbers that do not depend on the order of samples, if that is possible."""
    if any(c.samples is None for c in contents):
        return None
    samples = sum(c.samples for c in contents if c.samples is not None)
    return samples, sum(c.total for c in contents) % (1 << 64)


def total_of_batches(contents: Sequence[Content]) -> tuple[int, int]:
    """Return numbers that do not depend on the order of batches."""
    return len(contents), sum(hash(c.digests) for c in contents) % (1 << 64)


def _rows(tensor: Tensor) -> Tensor:
    """Return a hash for each entry of the first dimension."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    tensor = _resolved(tensor)
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    label = zlib.crc32(f"{tensor.dtype}, {tuple(tensor.shape[1:])}".encode())
    if tensor.numel() == 0:
        return torch.full(
            (tensor.shape[0],), label, dtype=torch.int64, device=tensor.device
        )
    flat = tensor.reshape(tensor.shape[0], -1).contiguous().view(torch.uint8)
    missing = -flat.shape[1] % 8
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return _hash(flat.view(torch.int64)) ^ label


def _hash(words: Tensor) -> Tensor:
    """Hash the rows of a matrix of 64-bit words."""
    number, width = words.shape
    if width > _WORDS:
        whole = width // _WORDS * _WORDS
        chunks = [_hash(words[:, :whole].reshape(-1, _WORDS)).reshape(number, -1)]
        if whole < width:
            chunks.append(_hash(words[:, whole:]).unsqueeze(1))
        return _hash(torch.cat(chunks, dim=1))
    keys = _keys(words.device)[:width]
    step = max(1, _BLOCK // max(width, 1))
    sums = []
    for part in words.split(step):
        # the high half onto the low one: of factors that are zero but for high bits, a
        # product has high bits only
        folded = _shifted(part, 32)
        folded ^= part
        folded *= keys
        sums.append(folded.sum(dim=1))
    return _mixed(torch.cat(sums) + width)


@functools.cache
def _keys(device: torch.device) -> Tensor:
    numbers = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
    return _mixed(numbers * _SEED) | 1


def _mixed(h: Tensor) -> Tensor:
    """Let every bit depend on every other (the last step of MurmurHash3)."""
    h = h ^ _shifted(h, 33)
    h = h * _MIX[0]
    h = h ^ _shifted(h, 33)
    h = h * _MIX[1]
    return h ^ _shifted(h, 33)


def _mixed_number(number: int) -> int:
    return int(_mixed(torch.tensor(number, dtype=torch.int64, device="cpu")))


def _shifted(h: Tensor, by: int) -> Tensor:
    """Shift to the right as if there was no sign."""
    shifted = h >> by
    shifted &= (1 << (64 - by)) - 1
    return shifted


def _resolved(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg()


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor of another layout consists of."""
    if tensor.is_nested:
        return [t.reshape(-1) for t in tensor.unbind()]
    layout = tensor.layout
    if layout == torch.strided:
        return [tensor]
    if layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]
