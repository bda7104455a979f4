"""The way of batches to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from torchlinop.data.batches import Batch
from torchlinop.data.objects import tensors_of


def transferred(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device.

    On a CUDA device the next batch is on its way while the one before is used: it is
    copied from pinned memory, in a stream of its own.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    copies.wait_stream(torch.cuda.current_stream(device))  # which made what is there
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = batch.to(device), copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = coming
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: Batch, event: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the current stream wait for a batch, and its memory for the current stream."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for tensor in tensors_of((batch.X, batch.y)):
        if tensor.device == device:
            tensor.record_stream(stream)
    return batch
