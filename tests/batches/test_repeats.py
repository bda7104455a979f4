"""Fixed, shuffled and random data are told apart."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchlinop import GGNLinearOperator, JacobianLinearOperator
from torchlinop.data import DataChangedError, seeds

from tests.batches.sources import (
    DATASET,
    Changed,
    N,
    X,
    Y,
    late_noise,
    noise,
    own_generator,
    random_target,
    rare_noise,
    same,
    source_of,
    surveyed,
    tail_noise,
)

AUGMENTED = [noise, late_noise, rare_noise, random_target, tail_noise]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("change", [*AUGMENTED, own_generator()], ids=lambda f: f.__name__)
def test_augmented_data_is_refused(change, shuffle):
    loader = DataLoader(Changed(change), batch_size=4, shuffle=shuffle)
    with pytest.raises(ValueError, match=r"is random: batch \d+ held other values.*list\("):
        surveyed(loader)


def _mixed(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x, (y, y.flip(0), random.random())


def _padded(samples):
    """Every sample has as many entries as its label and index say."""
    rows = [x.repeat(1 + int(y)) for x, y in samples]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack(
        [y for _, y in samples]
    )


def _graphs(samples):
    nodes = torch.cat([x.repeat(1 + int(y), 1) for x, y in samples])
    return {"x": nodes, "sizes": torch.stack([1 + y for _, y in samples])}, torch.stack(
        [y for _, y in samples]
    )


def test_a_random_number_next_to_the_tensors_is_refused():
    with pytest.raises(ValueError, match="number or string"):
        surveyed(DataLoader(DATASET, batch_size=4, collate_fn=_mixed))


class Drawing:
    """A re-iterable of batches that are made by a function of the pass."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        yield from self.draw()


def _drawn_rows():
    for _ in range(3):
        rows = torch.randint(N, (8,))
        yield X[rows], Y[rows]


def _drawn_number():
    yield X[:4], Y[:4]
    for _ in range(random.randrange(1, 50)):
        yield X[4:8], Y[4:8]


def _drawn_split():
    """All samples, but random targets."""
    yield X, Y[torch.randperm(N)]


class Stream(IterableDataset):
    def __iter__(self):
        return ((x + np.random.rand(), y) for x, y in zip(X, Y, strict=True))


@pytest.mark.parametrize("draw", [_drawn_rows, _drawn_number, _drawn_split])
def test_what_draws_in_its_own_way_is_refused(draw):
    with pytest.raises(ValueError, match="The data is random"):
        surveyed(Drawing(draw))


def test_a_random_stream_is_refused():
    with pytest.raises(ValueError, match="other values in 10 of 10 batches"):
        surveyed(DataLoader(Stream(), batch_size=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shuffle": True, "drop_last": True, "batch_size": 7},
            "drop_last=True leaves out",
        ),
        ({"sampler": RandomSampler(DATASET, replacement=True)}, "RandomSampler"),
        ({"sampler": WeightedRandomSampler([1.0] * N, N)}, "WeightedRandomSampler"),
        ({"sampler": RandomSampler(DATASET, num_samples=9)}, "draws other samples"),
        (
            {"batch_sampler": BatchSampler(RandomSampler(DATASET), 7, drop_last=True)},
            "drop_last=True leaves out",
        ),
    ],
    ids=["drop_last", "replacement", "weighted", "subset", "batch_sampler"],
)
def test_samplers_that_draw_other_samples_are_refused(options, message):
    reads = []
    loader = DataLoader(Changed(same, reads), **options)
    with pytest.raises(ValueError, match=message):
        surveyed(loader)
    assert not reads  # the indices tell


def _batches_in_any_order():
    order = torch.randperm(10)
    return ((X[4 * i : 4 * i + 4].T, Y[4 * i : 4 * i + 4]) for i in order)


def _samples_in_any_order():
    order = np.random.permutation(N)
    return ((X[rows], Y[rows]) for rows in torch.from_numpy(order).split(4))


SHUFFLED = {
    "loader": DataLoader(DATASET, batch_size=7, shuffle=True),
    "nothing dropped": DataLoader(DATASET, batch_size=8, shuffle=True, drop_last=True),
    "padded": DataLoader(DATASET, batch_size=4, shuffle=True, collate_fn=_padded),
    "graphs": DataLoader(DATASET, batch_size=4, shuffle=True, collate_fn=_graphs),
    "without batches": DataLoader(
        list(zip(X.split(4), Y.split(4), strict=True)), batch_size=None, shuffle=True
    ),
    "two samples": DataLoader(TensorDataset(X[:2], Y[:2]), shuffle=True),
    "batches": Drawing(_batches_in_any_order),
    "samples": Drawing(_samples_in_any_order),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_data_is_told_from_random_data(name, check):
    source = surveyed(SHUFFLED[name], check=check)
    assert source.shuffles
    with pytest.raises(ValueError, match=r"another order in every pass.*shuffle=False"):
        source.require_order()
    for _ in range(2):
        assert len(list(source)) == source.num_batches


def test_one_order_from_the_global_generators_is_used_in_all_passes():
    source = surveyed(SHUFFLED["loader"])
    passes = []
    for _ in range(2):
        torch.randn(3)
        passes.append(torch.cat([batch.X for batch in source]))
    assert torch.equal(*passes)
    assert not torch.equal(passes[0], X)


FIXED = {
    "loader": DataLoader(DATASET, batch_size=7),
    "dropped": DataLoader(DATASET, batch_size=7, drop_last=True),
    "nan": DataLoader(TensorDataset(X / 0, X * torch.nan), batch_size=7),
    "sparse": Drawing(lambda: [(X.to_sparse(), Y), (X.T.to_sparse_csr(), Y)]),
    "same draws": Drawing(lambda: [(np.random.default_rng(0).random((3, 2)), Y[:3])]),
    "generator": DataLoader(DATASET, batch_size=7, generator=torch.Generator()),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", FIXED)
def test_fixed_data_passes(name):
    source = surveyed(FIXED[name])
    source.require_order()
    assert len(list(source)) == source.num_batches


def test_other_companions_that_cannot_be_seen_through():
    def draw():
        rows = [X[i].repeat(1 + int(Y[i])) for i in torch.randperm(N)]
        parts = (rows[i : i + 4] for i in range(0, N, 4))
        return ((nn.utils.rnn.pad_sequence(p, batch_first=True), Y[:4]) for p in parts)

    with pytest.raises(ValueError, match=r"cannot be shown.*check_deterministic=False"):
        surveyed(Drawing(draw))
    assert surveyed(Drawing(draw), check=False).shuffles


def test_random_data_in_workers_is_refused():
    loader = DataLoader(
        Changed(noise),
        batch_size=8,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    with pytest.raises(ValueError, match="batch 0 held other values"):
        surveyed(loader)


@pytest.mark.parametrize(("check", "passes"), [(True, 2), (False, 1)])
def test_the_check_is_one_more_pass(check, passes):
    for shuffle in (False, True):
        reads = []
        looks = []
        loader = DataLoader(Changed(same, reads), batch_size=4, shuffle=shuffle)
        source_of(loader).survey(
            lambda batch, looks=looks: looks.append(batch), check=check
        )
        assert len(reads) == passes * N
        assert [batch.position for batch in looks] == list(range(10))


def test_a_list_is_read_once():
    reads = []
    source = source_of([(X, Y), (X, Y)], batch_size=lambda X: len(reads.append(X) or X))
    survey = source.survey(lambda batch: None, check=True)
    assert len(reads) == 2
    survey.require_order()


def test_a_survey_changes_nothing():
    data = [(X[:4], Y[:4])]
    source = surveyed(data)
    data.append((X[4:], Y[4:]))

    def look(batch):
        if batch.position == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.survey(look, check=True)
    source.survey(lambda batch: None, check=True)
    assert source.num_batches == 1
    with pytest.raises(DataChangedError, match="2 batches in this pass"):
        list(source)


@pytest.mark.parametrize("name", ["loader", "batches", "samples"])
def test_other_samples_in_a_later_pass(name):
    source = surveyed(SHUFFLED[name])
    list(source)
    X[3, 1] += 1
    try:
        with pytest.raises(DataChangedError, match="other samples in this pass"):
            list(source)
    finally:
        X[3, 1] -= 1
    if name == "loader":  # exactly representable or not, the bits decide
        surveyed(SHUFFLED[name])


def test_an_order_that_is_lost_later():
    class Sampler(SequentialSampler):
        orders = iter(lambda: list(range(N)), None)

        def __iter__(self):
            return iter(next(self.orders))

    sampler = Sampler(DATASET)
    loader = DataLoader(DATASET, batch_size=4, sampler=sampler)
    model = nn.Linear(3, 3)
    J = JacobianLinearOperator(model, list(model.parameters()), loader, cache=False)
    J @ np.ones(12, dtype=np.float32)
    sampler.orders = iter(lambda: torch.randperm(N).tolist(), None)
    with pytest.raises(ValueError, match="another order in every pass"):
        J @ np.ones(12, dtype=np.float32)


def test_an_operator_refuses_augmented_data():
    model = nn.Linear(3, 3)
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters())
    loader = DataLoader(Changed(noise), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="held other values"):
        GGNLinearOperator(*arguments, loader)
    GGNLinearOperator(*arguments, loader, check_deterministic=False)


def test_interrupts_in_any_line_leave_the_random_states():
    def states():
        numpy = np.random.get_state()
        return random.getstate(), torch.get_rng_state().tolist(), str(numpy)

    def run():
        with seeds.RandomState(0).in_force():
            random.random(), np.random.random(), torch.rand(1)

    def interrupted(line):
        lines = itertools.count(1)

        def trace(frame, event, argument):
            if frame.f_code.co_filename != seeds.__file__:
                return None
            if event == "line" and next(lines) == line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    expected = states()
    line = 1
    while interrupted(line):
        assert states() == expected, line
        line += 1
    assert line > 20
