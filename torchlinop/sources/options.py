"""What every operator of a model and data can be told by keyword."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

from torchlinop._typing import CachePolicy
from torchlinop.distributed.ranks import ALONE, Ranks, ranks_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keyword arguments of every operator that is built from a model and data.

    Parameters
    ----------
    batch_size
        Function from an ``X`` to its number of samples. Default: ``X.num_graphs`` where
        there is one, and the first dimension of the first tensor in ``X`` otherwise.
    cache
        ``"auto"`` keeps linearizations of batches while they fit the memory budget, then
        on the host, and computes the others anew in each product; ``True`` keeps all on
        the device, ``False`` none.
    memory_budget
        In bytes. Default: half of the memory that is free on the device.
    host_memory_budget
        Bytes of host memory for what does not fit, where copying it to the device for each
        product takes less time than computing it anew (Hessian, GGN and Fisher matrices of
        data that is not shuffled). Default: half of what is free, for operators on a CPU
        nothing.
    check_deterministic
        Refuse what has no fixed matrix: modules that are random or depend on the rest of
        the batch (dropout and batch norm in training mode), a model or loss that gives
        two results for one batch, data of which two passes yield different samples. A
        loader is read twice for it.
    check_derivatives
        Compare one product with finite differences where the model calls an
        ``autograd.Function`` of the user's own, whose second derivative may be wrong
        without an error.
    check_finite
        Refuse NaN and infinity in parameters and data.
    progressbar
        Show progress over the batches.
    process_group
        A process group of :mod:`torch.distributed` whose processes hold shares of the
        data: ``torch.distributed.group.WORLD`` for all of them. Every process passes its
        own share (any size, none included) and the same model, and gets the operator of
        all data. All of them build it, multiply, and refresh it, or leave that to
        :func:`torchlinop.distributed.driver`. By default one process has all of the data.

    Raises
    ------
    TypeError, ValueError
        An option is not what is described above.
    RuntimeError
        The process group is not initialized, or this process is not in it.
    """

    batch_size: Callable[[Any], int] | None = None
    cache: CachePolicy = "auto"
    memory_budget: float | None = None
    host_memory_budget: float | None = None
    check_deterministic: bool = True
    check_derivatives: bool = True
    check_finite: bool = False
    progressbar: bool = False
    process_group: InitVar[Any] = "alone"
    #: the processes that share the data; the group itself ends when its user says so
    ranks: Ranks = field(init=False, default=ALONE)

    def __post_init__(self, process_group: Any) -> None:
        if not (isinstance(self.cache, bool) or self.cache == "auto"):
            raise ValueError(f"cache has to be 'auto', True or False, got {self.cache!r}.")
        for name in ("memory_budget", "host_memory_budget"):
            budget = getattr(self, name)
            if not (budget is None or isinstance(budget, (int, float))):
                raise TypeError(f"{name} is a number of bytes, got {budget!r}.")
        if not (self.batch_size is None or callable(self.batch_size)):
            raise TypeError(
                "batch_size is a function from X to the number of data in it, for instance "
                f"lambda X: len(X.ids), got {self.batch_size!r}."
            )
        object.__setattr__(self, "ranks", ranks_of(process_group))

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> Options:
        """Make options of keyword arguments; refuse unknown ones."""
        names = [part.name for part in dataclasses.fields(cls) if part.init]
        names.append("process_group")
        unknown = [name for name in keywords if name not in names]
        if unknown:
            raise TypeError(
                f"Unexpected keyword argument {unknown[0]!r}. The options are "
                f"{', '.join(names)}; a loss also takes reduction."
            )
        return cls(**keywords)
