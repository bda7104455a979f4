"""The cheapest way to multiply is found out, and gives the same as any other."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torchlinop.autodiff import columns, experience
from torchlinop.autodiff.columns import WARM_UP, LinearRows, PassingRows
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.replay import Replay, expected
from torchlinop.autodiff.sums import SummedRows

N = 6
MATRIX = torch.linspace(-1, 1, N * N, dtype=torch.float64).view(N, N)
NODES = 4000


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(columns, "time", clock)
    monkeypatch.setattr(columns, "_PAYS", 0.97)
    monkeypatch.setattr(expected, "_LITTLE", 0.005)
    monkeypatch.setattr(experience, "_EXPECTED", 0)
    return clock


class Function:
    """A product that takes a second, and a block that takes so much for each column."""

    def __init__(self, clock, *, block=1.0, nbytes=0):
        self.clock, self.block = clock, block
        self.singles, self.blocks = 0, []

    def __call__(self, v, *, batched=False):
        if batched:
            self.blocks.append(len(v))
            self.clock.now += self.block * len(v)
            return v @ MATRIX.T
        self.singles += 1
        self.clock.now += 1.0
        return MATRIX @ v


@pytest.fixture
def replays(monkeypatch, clock):
    """Recordings, counted; their replays take ``seconds``."""

    class Replays:
        seconds, recorded, nbytes, noise = 0.5, 0, 100, ()

        def run(self, v):
            clock.now += self.seconds + (self.noise.pop(0) if self.noise else 0)
            return MATRIX @ v

        def record(self, function, v):
            self.recorded += 1
            return function(v), Replay(self.run, self.nbytes)

    replays = Replays()
    monkeypatch.setattr(columns, "record", replays.record)
    return replays


def rows_of(function, nbytes=0):
    return LinearRows(function, nbytes=nbytes, nodes=NODES)


def products(rows, learned, count, **options):
    for _ in range(count):
        v = torch.randn(N, dtype=torch.float64)
        torch.testing.assert_close(rows.row(v, learned, **options), MATRIX @ v)


def test_a_few_products_are_not_worth_a_recording(clock, replays):
    # a recording takes two products and more, a replay is expected to save 4 %
    rows = rows_of(Function(clock))
    products(rows, Experience(), 44)
    assert replays.recorded == 0
    products(rows, Experience(), 1)
    assert replays.recorded == 1


def test_what_the_engine_has_no_part_in_is_not_recorded(clock, replays):
    rows = LinearRows(Function(clock), nbytes=0, nodes=1000)
    products(rows, Experience(expected=10**6), 100)
    assert replays.recorded == 0


def test_recorded_at_once_where_many_products_came_the_last_time(clock, replays):
    learned = Experience(expected=200)
    products(rows_of(Function(clock)), learned, WARM_UP)
    assert replays.recorded == 0
    products(rows := rows_of(Function(clock)), learned, WARM_UP + 1)
    assert replays.recorded == 1
    products(rows, learned, 3)
    assert replays.recorded == 1


@pytest.mark.parametrize(("remaining", "recorded"), [(5, 0), (500, 1)])
def test_known_number_of_columns(clock, replays, remaining, recorded):
    products(rows_of(Function(clock)), Experience(), WARM_UP + 1, remaining=remaining)
    assert replays.recorded == recorded


@pytest.mark.parametrize(("seconds", "pays"), [(0.5, True), (0.99, False), (2.0, False)])
def test_a_replay_stays_where_it_is_faster(clock, replays, seconds, pays):
    replays.seconds = seconds
    learned = Experience(expected=10**6)
    function = Function(clock)
    rows = rows_of(function)
    products(rows, learned, 20)
    assert learned.replays_pay is pays
    assert rows.replay_bytes == (replays.nbytes if pays else 0)
    before = function.singles
    products(rows, learned, 5)
    assert function.singles - before == (0 if pays else 5)
    # what was learned from one batch holds for the others
    products(rows_of(Function(clock)), learned, 20)
    assert replays.recorded == (2 if pays else 1)


def test_a_replay_is_not_dropped_for_noise(clock, replays):
    """The least of a few replays is compared with the least of many calls."""
    replays.seconds, replays.noise = 0.9, [0.15] * 8
    learned = Experience(expected=10**6)
    products(rows_of(Function(clock)), learned, 30)
    assert learned.replays_pay


def test_a_replay_stays_within_the_budget(clock, replays):
    function = Function(clock)
    rows = rows_of(function)
    products(rows, Experience(room=lambda: 99, expected=10**6), 20)
    assert replays.recorded == 1
    assert rows.replay_bytes == 0
    assert function.singles == 20


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("block", "preferred"), [(0.5, True), (1.5, False), (9.0, False)])
def test_blocks_where_they_are_faster(clock, replays, block, preferred, parts):
    functions = [Function(clock, block=block) for _ in range(parts)]
    rows = SummedRows([rows_of(f) for f in functions])
    learned = Experience()
    X = torch.randn(N, 4, dtype=torch.float64)
    for _ in range(5):
        out = torch.empty_like(X)
        rows.apply(X, out, learned)
        torch.testing.assert_close(out, parts * MATRIX @ X)
    blocks = len(functions[0].blocks)
    rows.apply(X, torch.empty_like(X), learned)
    assert (len(functions[0].blocks) > blocks) is preferred
    if not preferred:
        assert blocks <= 2


@pytest.mark.parametrize(("block", "preferred"), [(0.5, True), (1.5, False)])
def test_what_two_batches_have_shown_holds_for_the_others(clock, block, preferred):
    """They try a column and a block; the first block may be slow for being that."""
    functions = [Function(clock, block=2.5), *(Function(clock, block=block) for _ in "123")]
    learned = Experience()
    X = torch.randn(N, 4, dtype=torch.float64)
    for function in functions:  # none has been used before
        rows_of(function).apply(X, torch.empty_like(X), learned)
    tried = [(f.singles, f.blocks) for f in functions]
    assert tried[:2] == [(1, [3])] * 2
    assert tried[2:] == [(0, [4]) if preferred else (4, [])] * 2


def test_blocks_are_equally_large(clock, monkeypatch):
    """Nine columns, where four at most would fit the cache with their products."""
    monkeypatch.setattr(experience, "_CPU_BLOCK_BYTES", 4 * (2 * N * 8 + 5))
    function = Function(clock, block=0.5)
    X = torch.randn(N, 10, dtype=torch.float64)
    rows_of(function, nbytes=5).apply(X, out := torch.empty_like(X), Experience())
    torch.testing.assert_close(out, MATRIX @ X)
    assert (function.singles, function.blocks) == (1, [3, 3, 3])


def test_blocks_are_smaller_after_running_out_of_memory(clock):
    class Large(Function):
        def __call__(self, v, *, batched=False):
            if batched and len(v) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(v, batched=batched)

    function = Large(clock, block=0.1)
    X = torch.randn(N, 9, dtype=torch.float64)
    out = torch.ones_like(X)
    rows_of(function).apply(X, out, Experience(), add=True)
    torch.testing.assert_close(out, 1 + MATRIX @ X)
    assert set(function.blocks) == {2}


def test_columns_one_by_one_where_there_is_no_batching_rule(clock):
    class Unbatched(Function):
        def __call__(self, v, *, batched=False):
            if batched:
                raise NotImplementedError
            return super().__call__(v)

    learned = Experience()
    X = torch.randn(N, 3, dtype=torch.float64)
    out = torch.empty_like(X)
    rows_of(Unbatched(clock)).apply(X, out, learned)
    torch.testing.assert_close(out, MATRIX @ X)
    assert learned.limit == 1


def test_nothing_is_kept_of_passing_rows(clock, replays):
    function = Function(clock, block=2.0)
    linearized = []

    def linearize():
        linearized.append(1)
        return rows_of(function)

    rows = PassingRows(function, linearize)
    learned = Experience()
    v = torch.randn(N, 1, dtype=torch.float64)
    rows.apply(v, out := torch.ones_like(v), learned, add=True)
    torch.testing.assert_close(out, 1 + MATRIX @ v)
    assert not linearized
    X = torch.randn(N, 7, dtype=torch.float64)
    rows.apply(X, out := torch.empty_like(X), learned)
    torch.testing.assert_close(out, MATRIX @ X)
    assert len(linearized) == 1
    assert replays.recorded == 0  # for three products it would be thrown away


def test_a_block_of_the_cache_size(clock):
    learned = Experience()
    assert learned.block_size(8 << 20, torch.device("cpu")) == 4
    assert learned.block_size(1 << 30, torch.device("cpu")) == 1
    assert Experience().room() == math.inf


def test_results_are_not_held_while_the_next_columns_are_multiplied(monkeypatch):
    monkeypatch.setattr(columns, "COPIED", 1)  # column by column
    results = []

    def function(v, *, batched=False):
        assert all(result() is None for result in results)
        result = MATRIX @ v
        results.append(weakref.ref(result))
        return result

    X = torch.randn(N, 3, dtype=torch.float64)
    out = torch.empty_like(X)
    LinearRows(function, nbytes=0, nodes=0).apply(X, out, Experience())
    torch.testing.assert_close(out, MATRIX @ X)
    assert len(results) == 3
