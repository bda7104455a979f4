"""Whether data repeats itself: fixed, in another order in every pass, or random.

The first pass is compared with a second one that starts from other random states. Where
they differ, the same samples in another order are told from other samples: by the
indices that a DataLoader draws, by reading those indices twice in one order, and for
other data by numbers in which the order of the samples or of the batches drops out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from torchlinop.data.digests import Content, total, total_of_batches
from torchlinop.data.seeds import RandomState
from torchlinop.data.workers import index_sampler, options_of, reads_indices

#: two orders of up to so many entries may be the same by chance
_FEW = 20
_REMEDY = (
    "Turn off what is random (augmentation, noise, sampling), fix one draw with "
    "data=list(data), or pass check_deterministic=False."
)

#: From data, a seed to what its batches hold, read in that random state.
Read = Callable[[Iterable[Any], int], Iterator[Content]]


@dataclass(frozen=True)
class Repeats:
    """How the data repeats itself.

    Attributes
    ----------
    shuffles
        Whether the order changes from pass to pass.
    invariant
        What does not change, if that is known and the order does: the samples, or the
        batches.
    """

    shuffles: bool
    invariant: Literal["samples", "batches"] | None = None


def invariant_total(contents: list[Content], repeats: Repeats) -> tuple[int, int] | None:
    """Return numbers that are the same in every pass, whatever the order."""
    if repeats.invariant == "samples":
        return total(contents)
    return total_of_batches(contents) if repeats.invariant == "batches" else None


def index_order(data: Any, *, check: bool) -> bool | None:
    """Whether a DataLoader draws an order in every pass; None if its indices don't tell.

    Only indices are read. With ``check``, indices that are no permutation of those of
    another pass are an error.
    """
    if not reads_indices(data):
        return None
    first = _draws(data, 0)
    seeds = range(1, 2 if len(first) > _FEW else 9)
    others = (_draws(data, seed) for seed in seeds)
    other = next((drawn for drawn in others if drawn != first), first)
    if check and Counter(_flat(first)) != Counter(_flat(other)):
        raise ValueError(_drawn_differently(data))
    return other != first


def compare(data: Any, first: list[Content], shuffles: bool | None, read: Read) -> Repeats:
    """Read the data once more and say how it repeats itself.

    Parameters
    ----------
    first
        Of the first pass, which started from seed 0.
    shuffles
        What :func:`index_order` says.
    read
        Reads data from a seed.

    Raises
    ------
    ValueError
        It is random, or cannot be shown to be the same.
    """
    if shuffles is False:
        _require_equal(iter(first), read(data, 1), "it")
        return Repeats(False)
    second = list(read(data, 1))
    if first == second:
        return Repeats(bool(shuffles), "batches" if shuffles else None)
    if Counter(first) == Counter(second):
        return Repeats(True, "batches")
    if total(first) is not None and total(first) == total(second):
        return Repeats(True, "samples")
    if shuffles:  # then samples look otherwise in other company: padding, graphs
        one_order = _in_one_order(data)
        _require_equal(read(one_order, 0), read(one_order, 1), "the same list of indices")
        repeated = _draws(data, 0) == _draws(data, 0)  # passes start from there
        return Repeats(True, "batches" if repeated else None)
    raise ValueError(_difference(first, second))


def _require_equal(first: Iterator[Content], second: Iterator[Content], what: str) -> None:
    position = -1
    for position, here in enumerate(first):
        there = next(second, None)
        if there is None:
            raise ValueError(
                f"The data is random: a second pass ended after {position} batches. "
                + _REMEDY
            )
        if here != there:
            raise ValueError(
                f"The data is random: batch {position} held other values when {what} was "
                f"read again ({_part(here, there)}). A curvature matrix needs data that "
                f"repeats itself. {_REMEDY}"
            )
    if next(second, None) is not None:
        raise ValueError(
            f"The data is random: a second pass had more than {position + 1} batches. "
            + _REMEDY
        )


def _part(here: Content, there: Content) -> str:
    """Say in which part two batches differ."""
    if here.shapes != there.shapes:
        return "its tensors have other shapes"
    for index, shape in enumerate(here.shapes):
        if here.digests[index] != there.digests[index]:
            return f"tensor {index} in (X, y), rows of {shape}"
    return "a number or string in (X, y)"


def _difference(first: list[Content], second: list[Content]) -> str:
    if len(first) != len(second):
        found = f"{len(first)} batches in one pass and {len(second)} in another"
    else:
        before, after = total(first), total(second)
        rows = {content.shapes for content in first + second}
        if before is None or after is None or len(rows) > 1:
            return (
                "The data comes in other batches in every pass, and it cannot be shown "
                "that they hold the same samples: rows of the tensors are no samples, or "
                "are padded to the length of the batch. Pass data that comes in a fixed "
                "order, fix one order with data=list(data), or pass "
                "check_deterministic=False if only the order is random."
            )
        found = (
            f"{before[0]} samples in one pass and {after[0]} in another"
            if before[0] != after[0]
            else f"other values in {sum(map(Content.__ne__, first, second))} of "
            f"{len(first)} batches, in whatever order they are taken"
        )
    return (
        f"The data is random: {found}. A curvature matrix needs data that repeats itself. "
        + _REMEDY
    )


# ------------------------------------------------------------- indices of a DataLoader


def _draws(
    loader: DataLoader, seed: int, sampler: Iterable[Any] | None = None
) -> list[Any]:
    """Return the indices that a loader, or one of its samplers, draws from a seed."""
    with RandomState(seed, loader).in_force():
        drawn = index_sampler(loader) if sampler is None else sampler
        return [_index(entry) for entry in drawn]


def _index(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        return entry.tolist()
    if isinstance(entry, (list, tuple)):
        return [_index(part) for part in entry]
    return entry


def _flat(entries: list[Any]) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, list):
            yield from _flat(entry)
        else:
            yield entry if entry.__hash__ else repr(entry)


def _in_one_order(loader: DataLoader) -> DataLoader:
    """Return a loader of the same batches that reads the same indices in every pass."""
    with RandomState(2, loader).in_force():
        indices = list(index_sampler(loader))
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "generator": loader.generator,
        **options_of(loader),
    }
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=indices, **options)
    return DataLoader(loader.dataset, batch_sampler=indices, **options)


def _drawn_differently(loader: DataLoader) -> str:
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if getattr(loader.batch_sampler, "drop_last", False):
        both = [Counter(_flat(_draws(loader, seed, sampler))) for seed in (0, 1)]
        if both[0] == both[1]:
            return (
                "The data is random: drop_last=True leaves out other samples in every "
                "pass of the shuffled DataLoader. Pass drop_last=False, or shuffle=False, "
                "or fix one draw with data=list(data)."
            )
    return (
        "The data is random: the DataLoader draws other samples in every pass, by its "
        f"{type(loader.batch_sampler or sampler).__name__} over a {type(sampler).__name__}"
        ". Pass a loader with shuffle=False and no random sampler, fix one draw with "
        "data=list(data), or pass check_deterministic=False."
    )
