"""Replaying the kernels of a linear function without the machinery around them.

A product with a linearization is a walk through an autograd graph. The kernels it calls
are the same every time. So they are recorded (`recording`), those that depend on the
argument are selected (`selecting`), simplified (`simplifying`), and written as a function
that calls them directly (`writing`), on a GPU as a CUDA graph (`captured`).

A recording that cannot be replayed (it reads a value back to the host, refers to memory
by position, or does not reproduce the function) is discarded. Whether a replay pays is
for the caller to find out (`autodiff/columns`).
"""

from torchlinop.autodiff.replay.expected import pays
from torchlinop.autodiff.replay.replayed import Replay, Unchecked, record

__all__ = ["Replay", "Unchecked", "pays", "record"]
