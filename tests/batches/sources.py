"""Small data sets and what may be wrong with them."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset
from torchlinop.data import DataSource

CPU = torch.device("cpu")
N = 40
TORCH_SEED = torch.Generator().manual_seed(5)
X = torch.randn(N, 3, generator=TORCH_SEED)
Y = torch.arange(N) % 3
DATASET = TensorDataset(X, Y)


def source_of(data, **options):
    return DataSource(data, CPU, **options)


def surveyed(data, *, check=True, **options):
    source = source_of(data, **options)
    source.accept(source.survey(lambda batch: None, check=check))
    return source


class Again:
    """The items of a list, which is not known to be one."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


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


def same(i, x, y):
    return x, y


def noise(i, x, y):
    return x + 1e-3 * torch.randn(3), y


def late_noise(i, x, y):
    return (x + np.random.randn() if i > N // 2 else x), y


def rare_noise(i, x, y):
    return (x + 1 if random.random() < 0.05 else x), y


def random_target(i, x, y):
    return x, torch.randint(100, ())


def tail_noise(i, x, y):
    """Behind the entries that products look at."""
    long = torch.zeros(1000)
    long[900] = torch.rand(())
    return long, y


def own_generator():
    generator = np.random.default_rng(0)
    return lambda i, x, y: (x + float(generator.random()), y)
