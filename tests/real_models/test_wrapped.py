"""Models inside of what torch wraps around them: a compiler, replicas, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.real_models.reference import Case, check, each, prepared


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, X):
        return X + self.down(torch.nn.functional.gelu(self.up(self.norm(X))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Linear(8, 3)

    def forward(self, X):
        return self.last(self.blocks(self.first(X)))


class Checkpointed(Network):
    """Recomputes its blocks, each by itself or all of them in one."""

    def __init__(self, *, sequential=False, **options):
        super().__init__()
        self.sequential = sequential
        self.options = options

    def forward(self, X):
        X = self.first(X)
        if self.sequential:
            X = checkpoint_sequential(self.blocks, 2, X, **self.options)
        else:
            for block in self.blocks:
                X = checkpoint(block, X, **self.options)
        return self.last(X)


def plain(dtype, model=None):
    model = prepared(Network() if model is None else model, dtype)
    data = [(torch.randn(n, 4).to(dtype), torch.randint(3, (n,))) for n in (4, 3)]
    return Case(model, nn.CrossEntropyLoss(), data)


def wrapped(dtype, wrap):
    """The reference is the model before it was wrapped."""
    case = plain(dtype)
    model = wrap(case.model)
    params = list(model.parameters())
    assert all(p is q for p, q in zip(params, case.params, strict=True))
    return replace(case, model=model, params=params, plain=case.model)


def compiled(dtype):
    return wrapped(dtype, lambda model: torch.compile(model, backend="aot_eager"))


def compiled_by_dynamo_alone(dtype):
    return wrapped(dtype, lambda model: torch.compile(model, backend="eager"))


def compiled_in_place(dtype):
    case = plain(dtype)
    network = Network.forward.__get__(case.model)  # what is not compiled
    case.model.compile(backend="aot_eager")
    return replace(case, plain=network)


def compiled_inside(dtype):
    """As diffusion and language models compile their repeated blocks."""
    case = plain(dtype)
    originals = list(case.model.blocks)
    model = case.model
    for i, block in enumerate(originals):
        model.blocks[i] = torch.compile(block, backend="aot_eager")

    def network(X):
        X = model.first(X)
        for block in originals:
            X = block(X)
        return model.last(X)

    return replace(case, params=list(model.parameters()), plain=network)


def data_parallel(dtype):
    return wrapped(dtype, nn.DataParallel)


def distributed(dtype):
    return wrapped(dtype, nn.parallel.DistributedDataParallel)


def checkpointed(dtype, **options):
    case = plain(dtype, Checkpointed(**options))
    model = case.model
    return replace(case, plain=lambda X: Network.forward(model, X))


def checkpointed_without_reentry(dtype):
    return checkpointed(dtype, use_reentrant=False)


def checkpointed_with_reentry(dtype):
    return checkpointed(dtype, use_reentrant=True)


def checkpointed_sequence(dtype):
    return checkpointed(dtype, sequential=True, use_reentrant=False)


CASES = [
    plain,
    compiled,
    compiled_by_dynamo_alone,
    compiled_in_place,
    compiled_inside,
    data_parallel,
    distributed,
    checkpointed_without_reentry,
    checkpointed_with_reentry,
    checkpointed_sequence,
]


@pytest.fixture(autouse=True)
def _process_group(request):
    """A group of this process alone, and a compiler that remembers nothing."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.compiler.reset()


@each(CASES)
def test_hessian(build):
    check("Hessian", build)


@each(CASES)
def test_ggn(build):
    check("GGN", build)


@each(CASES)
def test_jacobian(build):
    check("Jacobian", build)
