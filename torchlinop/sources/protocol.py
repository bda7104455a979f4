"""The role that models on data, risks and plain functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from torchlinop._space import ParameterSpace
from torchlinop.autodiff.recording import recording
from torchlinop.data import Batch
from torchlinop.sources.options import Options

Result = TypeVar("Result")


class Batches(Protocol):
    """The data of a source, the same in every pass."""

    @property
    def num_batches(self) -> int:
        """How many batches there are."""

    @property
    def shuffles(self) -> bool:
        """Whether every pass has an order of its own."""

    @property
    def lasts(self) -> bool:
        """Whether every pass yields the same objects, which the source watches."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""

    def require_order(self) -> None:
        """Refuse data that shuffles."""

    def rest(self) -> None:
        """Give back what is kept between passes: there will be none for a while."""


class Source(Protocol):
    """A function of parameters, batch by batch, at a point that may move.

    Attributes
    ----------
    space
        The parameters.
    options
        What the user has asked for.
    """

    space: ParameterSpace
    options: Options

    @property
    def looks(self) -> int:
        """How often function and data were looked at; what is kept belongs to one look."""

    @property
    def batches(self) -> Batches:
        """The data."""

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves at the point: memory and version counters are shared."""

    def predict(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        """Evaluate the function at ``leaves`` on one batch."""

    def draws(self, batch: Batch) -> bool:
        """Whether Python's or NumPy's random numbers may be drawn in an evaluation."""

    def require_unchanged(self, batch: Batch) -> None:
        """Refuse a batch that has another weight in the whole than in the last look."""

    def record(
        self, batch: Batch, build: Callable[[list[Tensor]], Result], *, order: int
    ) -> Result:
        """Run ``build(leaves)``, which evaluates the function on ``batch``.

        ``order`` is 2 for the Hessian, 1 for what is made of Jacobians.
        """

    def explained(self, error: Exception, batch: Batch, *, order: int) -> Exception:
        """Return an error that names the operation, if a derivative is missing."""

    def changed(self) -> bool:
        """Whether anything that lasts (all but a loader's batches) changed since a look."""

    def survey(self) -> None:
        """Look at function and data anew, and check what was asked for.

        What was known before stays valid until this has succeeded.
        """


class ScalarSource(Source, Protocol):
    """A source whose values end in a scalar, such as a loss."""

    def differential(self, leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return an output and the slope of the scalar in it, differentiable in it."""


def record_with_rules(
    source: Source, batch: Batch, build: Callable[[list[Tensor]], Result], order: int
) -> Result:
    """Run ``build(leaves)`` for its graph; a missing derivative is explained.

    Rules for cheap second derivatives are in force where the function allows it.
    """
    device, draws = source.space.device, source.draws(batch)
    try:
        with recording(device, draws=draws):
            return build(source.leaves())
    except Exception:  # what is really wrong is raised by the second attempt
        pass
    try:
        with recording(device, rules=False, draws=draws):
            return build(source.leaves())
    except Exception as error:
        raise source.explained(error, batch, order=order) from error
