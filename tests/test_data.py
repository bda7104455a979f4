"""Data sources: what repeats itself, random states, tensors in objects."""

from __future__ import annotations

import abc
import copy
import random
from collections import UserDict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchlinop import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator
from torchlinop.data import Batch, DataChangedError, DataSource
from torchlinop.data.digests import _rows, content
from torchlinop.data.objects import moved, tensors_of

CPU = torch.device("cpu")
META = torch.device("meta")
N = 40
TORCH_SEED = torch.Generator().manual_seed(5)
X = torch.randn(N, 3, generator=TORCH_SEED)
Y = torch.arange(N) % 3


def _source(data, **options):
    return DataSource(data, CPU, **options)


def _surveyed(data, *, check=True, **options):
    source = _source(data, **options)
    source.accept(source.survey(lambda batch: None, check=check))
    return source


class Changed(Dataset):
    """``(X, y)`` with a change that is drawn anew in each reading."""

    def __init__(self, change, reads=None):
        self.change = change
        self.reads = [] if reads is None else reads

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.reads.append(i)
        return self.change(i, X[i], Y[i])


def _same(i, x, y):
    return x, y


def _noise(i, x, y):
    return x + 1e-3 * torch.randn(3), y


def _late_noise(i, x, y):
    return (x + np.random.randn() if i > N // 2 else x), y


def _rare_noise(i, x, y):
    return (x + 1 if random.random() < 0.05 else x), y


def _random_target(i, x, y):
    return x, torch.randint(100, ())


def _tail_noise(i, x, y):
    """Behind the entries that products look at."""
    long = torch.zeros(1000)
    long[900] = torch.rand(())
    return long, y


def _own_generator():
    generator = np.random.default_rng(0)
    return lambda i, x, y: (x + float(generator.random()), y)


AUGMENTED = [_noise, _late_noise, _rare_noise, _random_target, _tail_noise]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("change", [*AUGMENTED, _own_generator()], ids=lambda f: f.__name__)
def test_augmented_data_is_refused(change, shuffle):
    loader = DataLoader(Changed(change), batch_size=4, shuffle=shuffle)
    with pytest.raises(ValueError, match=r"is random: batch \d+ held other values.*list\("):
        _surveyed(loader)


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


DATASET = TensorDataset(X, Y)


def test_a_random_number_next_to_the_tensors_is_refused():
    with pytest.raises(ValueError, match="number or string"):
        _surveyed(DataLoader(DATASET, batch_size=4, collate_fn=_mixed))


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
        _surveyed(Drawing(draw))


def test_a_random_stream_is_refused():
    with pytest.raises(ValueError, match="other values in 10 of 10 batches"):
        _surveyed(DataLoader(Stream(), batch_size=4))


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
    loader = DataLoader(Changed(_same, reads), **options)
    with pytest.raises(ValueError, match=message):
        _surveyed(loader)
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
    source = _surveyed(SHUFFLED[name], check=check)
    assert source.shuffles
    with pytest.raises(ValueError, match=r"another order in every pass.*shuffle=False"):
        source.require_order()
    for _ in range(2):
        assert len(list(source)) == source.num_batches


def test_one_order_from_the_global_generators_is_used_in_all_passes():
    source = _surveyed(SHUFFLED["loader"])
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
    source = _surveyed(FIXED[name])
    source.require_order()
    assert len(list(source)) == source.num_batches


def test_other_companions_that_cannot_be_seen_through():
    def draw():
        rows = [X[i].repeat(1 + int(Y[i])) for i in torch.randperm(N)]
        parts = (rows[i : i + 4] for i in range(0, N, 4))
        return ((nn.utils.rnn.pad_sequence(p, batch_first=True), Y[:4]) for p in parts)

    with pytest.raises(ValueError, match=r"cannot be shown.*check_deterministic=False"):
        _surveyed(Drawing(draw))
    assert _surveyed(Drawing(draw), check=False).shuffles


def test_random_data_in_workers_is_refused():
    loader = DataLoader(
        Changed(_noise),
        batch_size=8,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    with pytest.raises(ValueError, match="batch 0 held other values"):
        _surveyed(loader)


@pytest.mark.parametrize(("check", "passes"), [(True, 2), (False, 1)])
def test_the_check_is_one_more_pass(check, passes):
    for shuffle in (False, True):
        reads = []
        looks = []
        loader = DataLoader(Changed(_same, reads), batch_size=4, shuffle=shuffle)
        _source(loader).survey(lambda batch, looks=looks: looks.append(batch), check=check)
        assert len(reads) == passes * N
        assert [batch.position for batch in looks] == list(range(10))


def test_a_list_is_read_once():
    reads = []
    source = _source([(X, Y), (X, Y)], batch_size=lambda X: len(reads.append(X) or X))
    survey = source.survey(lambda batch: None, check=True)
    assert len(reads) == 2
    survey.require_order()


def test_a_survey_changes_nothing():
    data = [(X[:4], Y[:4])]
    source = _surveyed(data)
    data.append((X[4:], Y[4:]))

    def look(batch):
        if batch.position == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.survey(look, check=True)
    source.survey(lambda batch: None, check=True)
    assert source.num_batches == 1
    with pytest.raises(DataChangedError, match="Batch 1 of the data is not the one"):
        list(source)


@pytest.mark.parametrize("name", ["loader", "batches", "samples"])
def test_other_samples_in_a_later_pass(name):
    source = _surveyed(SHUFFLED[name])
    list(source)
    X[3, 1] += 1
    try:
        with pytest.raises(DataChangedError, match="other samples in this pass"):
            list(source)
    finally:
        X[3, 1] -= 1
    if name == "loader":  # exactly representable or not, the bits decide
        _surveyed(SHUFFLED[name])


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
    loader = DataLoader(Changed(_noise), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="held other values"):
        GGNLinearOperator(*arguments, loader)
    GGNLinearOperator(*arguments, loader, check_deterministic=False)


# -------------------------------------------------------------------------- content


def _content(*tensors, **facts):
    return content(Batch(0, (*tensors, facts), None, 1, tensors))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("width", [1, 7, 1023, 1025, 5000])
def test_every_entry_counts(dtype, width):
    x = torch.zeros(3, width).to(dtype)
    before = _content(x)
    found = {before}
    for position in {0, width // 2, width - 1}:
        for row in range(3):
            x[row, position] = 1
            found.add(_content(x))
            x[row, position] = 0
    assert _content(x) == before
    places = len({0, width // 2, width - 1})
    assert len({c.digests for c in found}) == 1 + 3 * places
    assert len({c.total for c in found}) == 1 + places  # whichever row it is


def test_the_total_is_that_of_samples_in_any_order():
    order = torch.randperm(N)
    here, there = _content(X, Y), _content(X[order], Y[order])
    assert here.total == there.total
    assert here.digests != there.digests
    assert here.samples == N
    assert here.total != _content(X, Y[order]).total
    columns = torch.stack([X[order, 0], X[:, 1], X[:, 2]], dim=1)
    assert here.total != _content(columns, Y).total
    assert here.total != _content(X, Y, weight=2.0).total
    assert here.total != _content(X.view(torch.int32), Y).total


def test_few_bits_do_not_collide():
    """Ones and zeros have nothing but zeros in their low bits."""
    rows = torch.tensor(np.unpackbits(np.arange(4096, dtype=">u2").view(np.uint8)))
    for dtype in (torch.float64, torch.float32, torch.int64):
        matrix = rows.reshape(4096, 16)[:, 4:].to(dtype)
        assert len(_rows(matrix).unique()) == 4096


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_all_kinds_are_read():
    base = torch.randn(6, 8)
    nested = torch.nested.nested_tensor([base[:2].clone(), base[2:].clone()])
    for tensor in (base.T, base[1:, 1:], base[1:, :3].bfloat16(), base.to_sparse(), nested):
        assert _content(tensor) == _content(tensor.clone())
        assert _content(tensor).digests != _content(2 * tensor).digests
    complex_ = base.to(torch.complex64) * 1j
    assert _content(complex_.conj()) == _content(complex_.conj().resolve_conj())
    assert _content(torch.empty(0, 3)) != _content(torch.empty(0, 4))


# --------------------------------------------------------------------- random states


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
    source = _source(loader)
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
    source = _surveyed(DataLoader(Changed(_noise), batch_size=4), check=False)
    first = [batch.X for batch in source]
    for batch in source:
        assert torch.equal(batch.X, first[batch.position])
        torch.randn(5), np.random.randn(), random.random()


# -------------------------------------------------------------------------- objects

Pair = namedtuple("Pair", "x scale")


class Encoding(UserDict):
    def to(self, device):
        """In place, as Hugging Face has it."""
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "frozen"


class Slots:
    __slots__ = ("__hidden", "empty", "x")

    def __init__(self, x):
        self.x, self.__hidden = x, {"more": [x + 1]}


class Holder:
    def __init__(self, x):
        self.x = x


#: as torch_geometric makes the class of a batch
Borrowed = abc.ABCMeta("Borrowed", (Holder,), {"__module__": "abc"})


class Plain:
    def __init__(self, x):
        self.inner = {"x": [x]}
        self.me = self


class Graph:
    """Moves in place what lies in a dict of its own."""

    num_graphs = 2

    def __init__(self, x):
        self.store = {"x": x, "sizes": torch.ones(2)}

    def to(self, device):
        self.store["x"] = self.store["x"].to(device)  # sizes stay


OBJECTS = {
    "dict": lambda x: {"x": x, "n": 1},
    "UserDict": lambda x: UserDict(x=x),
    "UserDict with to": lambda x: Encoding(x=x),
    "read-only mapping": lambda x: MappingProxyType({"x": x}),
    "namedtuple": lambda x: Pair(x, 2.0),
    "deque": lambda x: deque([x]),
    "frozen dataclass": Frozen,
    "slots": Slots,
    "cycle": Plain,
    "made elsewhere": Borrowed,
    "in place": Graph,
    "nested": lambda x: [{"a": (Frozen(x), Plain(2 * x))}, "text"],
    "packed": lambda x: nn.utils.rnn.pack_sequence([x, x[:1]]),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_tensors_in_objects(kind):
    value = OBJECTS[kind](torch.randn(3, 2))
    found = tensors_of(value)
    assert len(found) == (2 if kind in ("slots", "in place", "nested", "packed") else 1)
    there = moved(value, META)
    devices = [tensor.device for tensor in tensors_of(there)]
    if kind in ("packed", "in place"):  # they know better
        assert devices == [META, CPU]
    else:
        assert devices == [META] * len(found)
    if kind != "read-only mapping":
        assert type(there) is type(value)
    assert there is not value
    assert all(map(lambda a, b: a is b, tensors_of(value), found))
    assert {tensor.device for tensor in found} == {CPU}
    if kind == "cycle":
        assert there.me is there


@pytest.mark.parametrize("kind", OBJECTS)
def test_changes_in_objects_are_noticed(kind):
    data = [(OBJECTS[kind](torch.randn(3, 2)), Y[:3])]
    source = _surveyed(data)
    list(source)
    tensors = source.lasting_tensors()
    assert len(tensors) == 1 + len(tensors_of(data[0][0]))
    tensors[0].data.mul_(2)
    with pytest.raises(DataChangedError, match="Batch 0"):
        list(source)


def test_replaced_parts_of_objects_are_noticed():
    value = Plain(X)
    data = [((value, Encoding(x=X)), 1.5), [X, Y]]
    source = _source(data)
    changes = [
        lambda: value.inner["x"].append(1),
        lambda: setattr(value, "other", X.clone()),
        lambda: data[0][0][1].update(x=X.clone()),
        lambda: data[1].__setitem__(0, X.clone()),
        lambda: data.append((X, Y)),
    ]
    for change in changes:
        before = source.identity()
        assert before == source.identity()
        change()
        assert before != source.identity()


@pytest.mark.parametrize("kind", ["UserDict", "frozen dataclass", "cycle", "in place"])
def test_an_operator_follows_a_change_in_an_object(kind):
    w = torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    value = OBJECTS[kind](x)

    def model(params, value):
        return tensors_of(value)[0] @ params[0]

    arguments = model, nn.CrossEntropyLoss(), [w], [(value, Y[:3])]
    options = {"batch_size": lambda value: 3}
    H = HessianLinearOperator(*arguments, **options)
    before = H @ np.ones(6) + H @ np.arange(6.0)
    x.mul_(2)
    fresh = HessianLinearOperator(*arguments, **options)
    np.testing.assert_allclose(H @ np.arange(6.0), fresh @ np.arange(6.0), rtol=1e-12)
    assert not np.allclose(before, fresh @ np.ones(6) + fresh @ np.arange(6.0))


def test_tensors_of_inference_mode_in_objects():
    with torch.inference_mode():
        x = torch.ones(2)
    for value in (Plain(x), Encoding(x=x), Graph(x)):
        assert tensors_of(value)[0].is_inference()
        assert not any(t.is_inference() for t in tensors_of(moved(value, CPU)))


class Hidden:
    """As an object of a C extension: nothing to be seen, but it can be moved."""

    __slots__ = ()
    where: Any = None

    def to(self, device):
        other = copy.copy(self)
        type(other).where = device
        return other


def test_an_object_that_hides_its_tensors_is_named_once():
    source = _source([((X, Hidden()), Y), (Hidden(), Y)], batch_size=lambda X: 1)
    with pytest.warns(UserWarning, match=r"type Hidden, .* not noticed.*refresh") as caught:
        survey = source.survey(lambda batch: None, check=True)
    assert len(caught) == 1
    source.accept(survey)
    source.survey(lambda batch: None, check=True)  # warnings are errors here
    list(source)
    assert Hidden.where == CPU


def test_objects_without_tensors_hide_nothing():
    plain = [np.arange(3), "text", None, 1.5, SimpleNamespace(), nn.Linear(1, 1)]
    source = _source([((X, *plain), Y)])
    source.accept(source.survey(lambda batch: None, check=True))


def test_number_of_samples():
    two = [({"s": torch.tensor(1.0), "x": X}, Y), (Graph(X), Y), (UserDict(x=X[:5]), Y)]
    two += [(Frozen(X[:4]), Y), (torch.tensor(2.0), Y), (X.numpy(), Y)]
    found = []
    _source(two).survey(lambda batch: found.append(batch.size), check=False)
    assert found == [N, 2, 5, 4, 1, N]
    with pytest.raises(TypeError, match=r"batch_size='many'.*number of samples"):
        _surveyed([(X, Y)], batch_size=lambda X: "many")
    with pytest.raises(TypeError, match=r"holds no tensor\. Pass batch_size="):
        _surveyed([("text", Y)])


def test_an_object_that_cannot_be_copied():
    class Single:
        def __init__(self):
            self.x = X

        def __copy__(self):
            raise NotImplementedError("one only")

    with pytest.raises(TypeError, match=r"holds a Single, .*one only.*__copy__"):
        list(_surveyed([(Single(), Y)]))
