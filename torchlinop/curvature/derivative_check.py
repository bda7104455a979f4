"""When a product is compared with finite differences: once, where users differentiate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchlinop.autodiff.graphs import custom_functions
from torchlinop.data import Batch
from torchlinop.sources import Source


class DerivativeCheck:
    """Says whether the linearization of a batch is to be checked.

    Parameters
    ----------
    source
        What is linearized.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._look = -1
        #: whether users' Functions have been found
        self.custom = False

    def over(self, batch: Batch) -> bool:
        """Whether nothing is to be checked on a batch, or has been already."""
        if not self._source.options.check_derivatives or batch.position:
            return True
        return self._look == self._source.looks

    def due(self, batch: Batch, outputs: Sequence[Tensor]) -> list[str]:
        """Return the names of the Functions that call for it: none if it has been done."""
        if self.over(batch):
            return []
        functions = custom_functions(outputs)
        self.custom = bool(functions)
        if not functions:
            self.done()
        return functions

    def done(self) -> None:
        """Check no more until function or data have changed."""
        self._look = self._source.looks
