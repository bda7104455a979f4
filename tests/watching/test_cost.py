"""What a run will cost."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torchlinop
from torchlinop import DiagonalLinearOperator, GGNLinearOperator, TorchLinearOperator, _cost

from tests.problems import classification
from tests.watching.matrices import Symmetric

MB = 1 << 20


class Wasteful(TorchLinearOperator):
    """Takes its time, allocates, and keeps some of it."""

    def __init__(self, temporary: int = 0, kept: int = 0, seconds: float = 0.0) -> None:
        super().__init__((4, 4), torch.float64, torch.device("cpu"))
        self.temporary, self.kept, self.seconds = temporary, kept, seconds
        self.held: torch.Tensor | None = None
        self.widths: list[int] = []

    def _apply(self, x):
        self.widths.append(x.shape[1])
        if self.held is None:
            self.held = torch.zeros(self.kept, dtype=torch.uint8).fill_(1)
            time.sleep(2 * self.seconds)
        scratch = torch.zeros(self.temporary, dtype=torch.uint8).fill_(1)
        time.sleep(self.seconds)
        del scratch
        return x.clone()

    def _adjoint(self):
        return self


def test_memory():
    cost = torchlinop.cost(Wasteful(temporary=150 * MB, kept=60 * MB))
    assert cost.bytes_kept == pytest.approx(60 * MB, abs=MB)
    assert cost.bytes_peak == pytest.approx(210 * MB, abs=MB)
    assert cost.fits
    assert cost.bytes_free > 200 * MB


def test_seconds():
    cost = torchlinop.cost(Wasteful(seconds=0.05), num_matvecs=101, columns=10)
    assert 0.15 <= cost.seconds_first < 0.4
    assert 0.05 <= cost.seconds_each < 0.15
    assert cost.seconds == pytest.approx(cost.seconds_first + 10 * cost.seconds_each)


def test_a_slow_operator_is_multiplied_once(monkeypatch):
    monkeypatch.setattr(_cost, "_SECONDS", 0.01)
    A = Wasteful(seconds=0.02)
    cost = torchlinop.cost(A)
    assert len(A.widths) == 1
    assert cost.seconds_each == cost.seconds_first


def test_a_line():
    G = GGNLinearOperator(*classification().arguments)
    line = str(torchlinop.cost(G, num_matvecs=200, columns=8))
    assert line.startswith("200 vectors in blocks of 8: ")
    assert "\n" not in line
    assert "kept" in line
    assert "free" in line
    assert str(torchlinop.cost(np.eye(3), num_matvecs=1)).startswith("1 vector: ")


def test_what_does_not_fit_is_said_and_not_refused(monkeypatch):
    monkeypatch.setattr(_cost, "available_memory", lambda _: 1e5)
    A = Wasteful()
    with pytest.warns(
        UserWarning, match=r"takes 128 kB or more, and 100 kB are free on cpu"
    ):
        cost = torchlinop.cost(A, num_matvecs=3000, columns=1000)
    assert not cost.fits
    assert set(A.widths) == {1}  # the block was never made
    assert cost.seconds > 0

    class Huge(Symmetric):
        def _apply(self, x):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.warns(UserWarning, match="cut the data into smaller batches"):
        cost = torchlinop.cost(Huge(torch.eye(3)))
    assert not cost.fits
    assert np.isnan(cost.seconds)


def test_bad_input():
    A = DiagonalLinearOperator(torch.ones(3))
    with pytest.raises(ValueError, match="num_matvecs has to be an integer"):
        torchlinop.cost(A, num_matvecs=0)
    with pytest.raises(ValueError, match="columns has to be an integer"):
        torchlinop.cost(A, columns=-1)
    with pytest.raises(ValueError, match="no entries"):
        torchlinop.cost(torch.zeros(0, 3))
