"""Worker processes of a loader: kept from pass to pass, the user's loader as it was."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchlinop import GGNLinearOperator
from torchlinop.data import DataChangedError

from tests.batches.sources import DATASET, N, X, Y, surveyed

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")


class Recorded(Dataset):
    """Rows of ``X``, with the number of the process that has read them."""

    def __init__(self, fails_at=None):
        self.scale = 1.0
        self.array = np.ones(3, dtype=np.float32)
        self.fails_at = fails_at
        self.me = self

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == self.fails_at:
            raise OSError("unreadable")
        process = torch.zeros(300)
        process[-1] = os.getpid()  # behind what is compared
        return self.scale * torch.from_numpy(self.array) * X[i], process


class Drawn(Dataset):
    """What all generators give."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        drawn = (
            torch.rand(()),
            torch.tensor(random.random()),
            torch.tensor(np.random.rand()),
        )
        return X[i], torch.stack([part.double() for part in drawn])


def loader_of(dataset, **options):
    return DataLoader(dataset, batch_size=4, **{"num_workers": 2, **options})


def processes(batches):
    return {int(y[-1]) for batch in batches for y in batch.y}


def children():
    gc.collect()
    return multiprocessing.active_children()


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = children()
    yield
    assert children() == before


def started(dataset=None, **options):
    """A source whose workers run, since an unchecked look has read the data once."""
    return surveyed(loader_of(dataset or Recorded(), **options), check=False)


def test_workers_stay():
    source = started()
    first = processes(source)
    assert len(first) == 2
    assert os.getpid() not in first
    assert processes(source) == first
    with_start = iter(source)
    next(with_start)
    with_start.close()  # abandoned half-way
    batches = list(source)
    assert processes(batches) == first
    assert torch.equal(torch.cat([b.X for b in batches]), X)
    source.rest()
    assert not children()
    assert processes(source).isdisjoint(first)


@pytest.mark.parametrize("shuffle", [False, True])
def test_random_numbers_start_anew_in_each_pass(shuffle):
    loader = loader_of(Drawn(), shuffle=shuffle)
    plain = copy.copy(loader)
    plain.worker_init_fn = lambda i: None  # these start anew
    kept, fresh = (surveyed(data, check=False) for data in (loader, plain))
    first, second, other = list(kept), list(kept), list(fresh)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.X, b.X)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.X, c.X)  # the order as the loader itself draws it
        assert torch.equal(a.y[:, :2], c.y[:, :2])  # NumPy has another start
    assert len(torch.cat([b.y[:, 0] for b in first]).unique()) == N
    with pytest.raises(ValueError, match="The data is random"):
        surveyed(loader)


def test_random_states_are_those_from_before():
    loader = loader_of(Recorded(), shuffle=True, generator=torch.Generator())
    source = surveyed(loader, check=False)

    def states():
        return torch.get_rng_state().tolist(), loader.generator.get_state().tolist()

    before = states()
    for _ in source:
        assert states() == before
    assert states() == before


def test_an_error_ends_the_workers():
    source = started(Recorded())
    source._data.dataset.fails_at = N - 1
    with pytest.raises(OSError, match="unreadable"):
        list(source)
    assert not children()
    source._data.dataset.fails_at = None
    assert torch.equal(torch.cat([b.X for b in source]), X)


def test_workers_that_have_ended_are_replaced():
    source = started()
    for process in processes(source):
        os.kill(process, signal.SIGINT)  # as Ctrl-C does
    for process in children():
        process.join()
    assert torch.equal(torch.cat([b.X for b in source]), X)


def test_changes_of_the_data_set_are_seen():
    source = started()
    first = processes(source)
    source._data.dataset.scale = 2.0
    with pytest.raises(DataChangedError, match="Batch 0"):
        list(source)
    source.accept(source.survey(lambda batch: None, check=False))
    source._data.dataset.array[:] = 3  # deeper: as the data of any loader, by a new look
    source.accept(source.survey(lambda batch: None, check=False))
    batches = list(source)
    assert torch.equal(batches[0].X, 6 * X[:4])
    assert processes(batches).isdisjoint(first)


def test_two_passes_at_once():
    source = started()
    for a, b in zip(source, source, strict=True):
        assert torch.equal(a.X, b.X)
        assert processes([a]).isdisjoint(processes([b]))
    del a, b
    assert len(children()) == 2  # one pair is kept


def test_workers_end_with_the_source():
    source = started()
    list(source)
    source.me = source  # in a reference cycle torch's own end would take 10 seconds
    del source
    start = time.perf_counter()
    assert not children()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_has_its_own(copied):
    source = started()
    other = copied(source)
    assert processes(other).isdisjoint(processes(source))


def test_a_loader_whose_workers_last_is_left_alone():
    loader = loader_of(DATASET, persistent_workers=True)
    items = iter(loader)
    next(items)
    source = surveyed(loader)
    assert len(list(source)) == 10
    assert len(list(items)) == 9
    del items, loader._iterator


def _prepare(number):
    get_worker_info().dataset.scale *= 2  # may be done only once


def test_workers_that_prepare_themselves_are_new_in_each_pass():
    source = started(worker_init_fn=_prepare)
    first, second = list(source), list(source)
    assert processes(first).isdisjoint(processes(second))
    assert torch.equal(first[0].X, second[0].X)
    assert torch.equal(first[0].X, 2 * X[:4])


def test_samples_without_batches():
    dataset = [(x, y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert torch.equal(torch.cat([b.X for b in surveyed(loader)]), X)


@pytest.mark.parametrize("cache", [False, "auto"])
def test_an_operator(cache):
    model = nn.Linear(3, 3)
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters())
    expected = GGNLinearOperator(*arguments, [(X, Y)])
    G = GGNLinearOperator(*arguments, loader_of(DATASET, shuffle=True), cache=cache)
    v = torch.randn(G.shape[1])
    workers = children()
    assert len(workers) == 2
    for _ in range(2):
        torch.testing.assert_close(G @ v, expected @ v)
        # all linearizations are kept: nobody reads the data again
        assert children() == (workers if cache is False else [])
    X[:2] *= 2
    try:
        torch.testing.assert_close(G @ v, expected @ v)
    finally:
        X[:2] /= 2
