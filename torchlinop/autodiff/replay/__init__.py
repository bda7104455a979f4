"""Replaying the kernels of a linear function without the machinery around them.

A product with a linearization is a walk through an autograd graph. The kernels it calls
are the same every time, so after a few calls they are recorded (`recording`), those that
depend on the argument are selected (`selecting`), simplified (`simplifying`), and written
as a function that calls them directly (`writing`).

A recording that cannot be replayed (it reads a value back to the host, refers to memory
by position, or does not reproduce the function) is discarded, and the function itself is
called as before.
"""

from torchlinop.autodiff.replay.replayed import WARM_UP, Replayed, record

__all__ = ["WARM_UP", "Replayed", "record"]
