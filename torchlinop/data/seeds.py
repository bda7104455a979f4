"""Random generators while data is read: seeded for each pass, given back after each item.

A pass has a random state of its own. It is in force only while an item is being made;
in between, also when a pass is abandoned or ends in an error, the generators are as the
user left them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


class RandomState:
    """A state of all random generators, to be put in place of the user's for a while.

    These are the global ones of Python, NumPy and torch, on the CPU and on every GPU in
    use, and those that were given to a DataLoader and its samplers.

    Parameters
    ----------
    seed
        Where it starts.
    data
        Perhaps a DataLoader.
    """

    def __init__(self, seed: int, data: Any = None) -> None:
        self._generators = [torch.default_generator, *_generators_of(data)]
        if torch.cuda.is_initialized():
            self._generators += torch.cuda.default_generators
        state: Any = np.random.get_state(legacy=False)
        self._normal = state["gauss"] if state["has_gauss"] else None
        with _given_back(self._generators, self._normal):
            random.seed(seed)
            for generator in self._generators:
                generator.manual_seed(seed)
            # NumPy's generator is exchanged: to copy its state takes 100 microseconds
            np.random.mtrand.set_bit_generator(np.random.MT19937(seed))
            self._own = _States(self._generators)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Let this state be the global one; it goes on from where it was left."""
        with _given_back(self._generators, self._normal):
            try:
                self._own.restore()
                yield
            finally:
                self._own = _States(self._generators)


class _States:
    """The states of Python's generator and some of torch's, and which one NumPy uses."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._python = random.getstate()
        self._torch = [(generator, generator.get_state()) for generator in generators]
        self._numpy = np.random.mtrand.get_bit_generator()

    def restore(self) -> None:
        np.random.mtrand.set_bit_generator(self._numpy)
        random.setstate(self._python)
        for generator, state in self._torch:
            generator.set_state(state)


@contextlib.contextmanager
def _given_back(generators: list[torch.Generator], normal: float | None) -> Iterator[None]:
    """Restore what a user's generators were; also where an interrupt comes meanwhile.

    ``normal``: the second of a pair of normal numbers, which NumPy keeps.
    """
    users = _States(generators)

    def restore() -> None:
        users.restore()
        if normal is not None:
            state: Any = np.random.get_state(legacy=False)
            np.random.set_state({**state, "has_gauss": 1, "gauss": normal})

    try:
        try:
            yield
        finally:
            restore()
    except BaseException:  # an interrupt, perhaps while they were being restored
        restore()
        raise


def seeded_pass(
    data: Iterable[Any], seed: int, *, reader: Iterable[Any] | None = None
) -> Iterator[Any]:
    """Yield the items of ``data``, made in a random state that starts at ``seed``.

    ``reader`` yields them instead, if there is one.
    """
    state = RandomState(seed, data)
    with state.in_force():
        iterator = iter(data if reader is None else reader)
    while True:
        with state.in_force():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that the user gave to a DataLoader and its samplers."""
    if not isinstance(data, DataLoader):
        return []
    inner = getattr(data.batch_sampler, "sampler", None)
    owners = (data, data.sampler, data.batch_sampler, inner)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
