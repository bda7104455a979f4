"""Tensors in objects of any kind: found, moved, watched, counted."""

from __future__ import annotations

import abc
import copy
import threading
from collections import UserDict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import HessianLinearOperator
from torchlinop.data import DataChangedError
from torchlinop.data.objects import moved, tensors_of

from tests.batches.sources import (
    CPU,
    Again,
    N,
    X,
    Y,
    source_of,
    surveyed,
)

META = torch.device("meta")

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
    tensors = surveyed(data).lasting_tensors()
    assert len(tensors) == 1 + len(tensors_of(data[0][0]))
    source = surveyed(Again(data))
    list(source)
    tensors[0].data.mul_(2)
    with pytest.raises(DataChangedError, match="Batch 0"):
        list(source)


def test_replaced_parts_of_objects_are_noticed():
    value = Plain(X)
    data = [((value, Encoding(x=X)), 1.5), [X, Y]]
    source = source_of(data)
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
    source = source_of([((X, Hidden()), Y), (Hidden(), Y)], batch_size=lambda X: 1)
    with pytest.warns(UserWarning, match=r"type Hidden, .* not noticed.*refresh") as caught:
        survey = source.survey(lambda batch: None, check=True)
    assert len(caught) == 1
    source.accept(survey)
    source.survey(lambda batch: None, check=True)  # warnings are errors here
    list(source)
    assert Hidden.where == CPU


def test_objects_without_tensors_hide_nothing():
    plain = [np.arange(3), "text", None, 1.5, SimpleNamespace(), nn.Linear(1, 1)]
    source = source_of([((X, *plain), Y)])
    source.accept(source.survey(lambda batch: None, check=True))


def test_number_of_samples():
    two = [({"s": torch.tensor(1.0), "x": X}, Y), (Graph(X), Y), (UserDict(x=X[:5]), Y)]
    two += [(Frozen(X[:4]), Y), (torch.tensor(2.0), Y), (X.numpy(), Y)]
    found = []
    source_of(two).survey(lambda batch: found.append(batch.size), check=False)
    assert found == [N, 2, 5, 4, 1, N]
    with pytest.raises(TypeError, match=r"batch_size='many'.*number of samples"):
        surveyed([(X, Y)], batch_size=lambda X: "many")
    with pytest.raises(TypeError, match=r"holds no tensor\. Pass batch_size="):
        surveyed([("text", Y)])


def test_an_object_without_tensors_is_not_copied():
    class Settings:
        def __init__(self):
            self.lock = threading.Lock()  # cannot be copied

    settings = Settings()
    there = moved({"x": X, "settings": settings}, META)
    assert there["settings"] is settings
    assert there["x"].device == META


def test_an_object_that_cannot_be_copied():
    class Single:
        def __init__(self):
            self.x = X

        def __copy__(self):
            raise NotImplementedError("one only")

    with pytest.raises(TypeError, match=r"holds a Single, .*one only.*__copy__"):
        list(surveyed([(Single(), Y)]))
