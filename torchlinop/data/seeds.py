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


@contextlib.contextmanager
def preserved_random_state(generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Give the global random states back as they were, and those of ``generators``.

    Global are those of Python, NumPy and torch, on the CPU and on every GPU in use.
    """
    generators = list(generators)
    state = _state(generators)
    try:
        yield
    finally:
        _restore(generators, state)


@contextlib.contextmanager
def seeded(seed: int, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Seed what :func:`preserved_random_state` gives back."""
    generators = list(generators)
    with preserved_random_state(generators):
        random.seed(seed)
        np.random.seed(seed)
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        yield


def seeded_pass(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """Yield the items of ``data``, drawn from a random state that starts at ``seed``."""
    generators = loader_generators(data)
    with seeded(seed, generators):
        iterator = iter(data)
        state = _state(generators)
    while True:
        with preserved_random_state(generators):
            _restore(generators, state)
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = _state(generators)
        yield item


def loader_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that the user gave to a DataLoader and its samplers."""
    if not isinstance(data, DataLoader):
        return []
    inner = getattr(data.batch_sampler, "sampler", None)
    owners = (data, data.sampler, data.batch_sampler, inner)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _state(generators: list[torch.Generator]) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return (
        random.getstate(),
        np.random.get_state(legacy=False),
        torch.get_rng_state(),
        cuda,
        [generator.get_state() for generator in generators],
    )


def _restore(generators: list[torch.Generator], state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda, own = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for index, values in enumerate(cuda):
        torch.cuda.set_rng_state(values, index)
    for generator, values in zip(generators, own, strict=True):
        generator.set_state(values)
