"""Random states while data is read."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
)

from tests.batches.sources import (
    Changed,
    noise,
    source_of,
    surveyed,
)


def _states(loader):
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return (
        python,
        numpy,
        torch.get_rng_state().tolist(),
        loader.generator.get_state().tolist(),
    )


def _all_draw(i, x, y):
    random.random()
    np.random.randn()
    torch.randn(())
    if i == 30:
        raise OSError("unreadable")
    return x, y


@pytest.mark.parametrize("cached_normal", [False, True])
def test_random_states_are_those_from_before(cached_normal):
    loader = DataLoader(
        Changed(_all_draw), batch_size=4, shuffle=True, generator=torch.Generator()
    )
    np.random.seed(1)
    if cached_normal:
        np.random.randn()  # draws two numbers, and keeps one
    before = _states(loader)
    source = source_of(loader)
    for check in (False, True):
        with pytest.raises(OSError, match="unreadable"):
            source.survey(lambda batch: None, check=check)
        assert _states(loader) == before
    loader.dataset.change = lambda i, x, y: _all_draw(0, x, y)
    source.accept(source.survey(lambda batch: None, check=True))
    assert _states(loader) == before
    for _ in source:  # in between, too
        assert _states(loader) == before
    assert _states(loader) == before
    abandoned = iter(source)
    next(abandoned)
    assert _states(loader) == before
    torch.randn(2), random.random()
    later = _states(loader)
    abandoned.close()
    assert _states(loader) == later


def test_what_is_drawn_between_batches_is_not_seen_by_the_data():
    source = surveyed(DataLoader(Changed(noise), batch_size=4), check=False)
    first = [batch.X for batch in source]
    for batch in source:
        assert torch.equal(batch.X, first[batch.position])
        torch.randn(5), np.random.randn(), random.random()
