"""Data sets as batches on one device: reading, moving, checking that they repeat."""

from torchlinop.data.batches import Batch, joined
from torchlinop.data.checks import require_batches
from torchlinop.data.passes import DataChangedError, DataSource, Survey
from torchlinop.data.seeds import RandomState

__all__ = [
    "Batch",
    "DataChangedError",
    "DataSource",
    "RandomState",
    "Survey",
    "joined",
    "require_batches",
]
