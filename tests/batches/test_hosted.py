"""Linearizations beyond the memory budget: on the host, or computed anew."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    _hosting,
)
from torchlinop.autodiff import hosted
from torchlinop.autodiff.hosted import HostedRows
from torchlinop.reference import dense_ggn, dense_hessian

N, BATCH = 42, 6
KINDS = [
    HessianLinearOperator,
    GGNLinearOperator,
    FisherMCLinearOperator,
    EFLinearOperator,
]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def arguments():
    torch.manual_seed(0)
    X, y = torch.randn(N, 8, dtype=torch.float64), torch.randint(3, (N,))
    model = nn.Sequential(
        nn.Linear(8, 10), nn.ReLU(), nn.GELU(), nn.Linear(10, 10), nn.Tanh()
    )
    model.append(nn.Linear(10, 3)).double()
    loader = DataLoader(TensorDataset(X, y), batch_size=BATCH)
    return model, nn.CrossEntropyLoss(), list(model.parameters()), loader


def beyond_the_budget(kind, arguments, *, device=2.5, host=2.5, **options):
    """An operator with room for so many batches on the device, and on the host."""
    one = kind(*arguments[:3], [next(iter(arguments[3]))], memory_budget=1e9)
    one @ torch.ones(one.shape[1], dtype=torch.float64)
    size = one._maps.nbytes + BATCH * 9 * 8
    budgets = {"memory_budget": device * size, "host_memory_budget": 1.2 * host * size}
    return kind(*arguments, **budgets, **options)


def on_the_host(A):
    return [m for m in A._maps._kept.maps.values() if isinstance(m, HostedRows)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_on_device_and_host_and_nowhere_add_up(kind, arguments):
    dense = {HessianLinearOperator: dense_hessian, GGNLinearOperator: dense_ggn}.get(kind)
    if dense is None:
        reference = kind(*arguments, cache=False)
        expected = reference @ torch.eye(reference.shape[1], dtype=torch.float64)
    else:
        expected = dense(*arguments)
    A = beyond_the_budget(kind, arguments)
    for _ in range(5):  # replays are recorded for those that are on the device
        v = torch.randn(A.shape[1], dtype=torch.float64)
        torch.testing.assert_close(A @ v, expected @ v, **CLOSE)
    V = torch.randn(A.shape[1], 4, dtype=torch.float64)
    torch.testing.assert_close(A @ V, expected @ V, **CLOSE)
    assert 1 <= len(on_the_host(A)) <= 3
    assert len(A._maps._kept.maps) < N // BATCH
    assert A._maps.nbytes <= A._maps._kept._limit


@pytest.mark.parametrize("kind", KINDS[:2])
def test_when_all_fit_no_data_is_read_any_more(kind, arguments):
    A = beyond_the_budget(kind, arguments, host=20)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    expected = kind(*arguments, cache=False) @ v
    reads = []
    monitored = arguments[3].dataset.__getitem__
    for _ in range(2):  # the batch that was too much is linearized again
        A @ v
    assert A._maps._kept.all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TensorDataset, "__getitem__", lambda d, i: reads.append(i) or monitored(i)
        )
        for _ in range(6):
            torch.testing.assert_close(A @ v, expected, **CLOSE)
    assert not reads
    assert len(on_the_host(A)) == N // BATCH - 2


def test_an_optimizer_step_begins_anew(arguments):
    A = beyond_the_budget(HessianLinearOperator, arguments)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    before = A @ v
    with torch.no_grad():
        for p in arguments[2]:
            p.add_(0.1)
    after = A @ v
    torch.testing.assert_close(after, dense_hessian(*arguments) @ v, **CLOSE)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert on_the_host(A)


def test_what_is_not_quicker_is_computed_anew(arguments, monkeypatch):
    tried = []
    of = HostedRows.of
    monkeypatch.setattr(_hosting, "_PAYS", 0.0)
    monkeypatch.setattr(HostedRows, "of", lambda *a: tried.append(a) or of(*a))
    A = beyond_the_budget(GGNLinearOperator, arguments)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(A @ v, dense_ggn(*arguments) @ v, **CLOSE)
    assert not on_the_host(A)
    with torch.no_grad():
        arguments[2][0].add_(0.1)
    A @ v
    assert len(tried) == 1  # the first one has shown it


def test_what_is_not_the_same_is_computed_anew(arguments, monkeypatch):
    right = hosted._Saved.of
    monkeypatch.setattr(hosted._Saved, "of", lambda s, memory: 1.01 * right(s, memory))
    A = beyond_the_budget(HessianLinearOperator, arguments)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(A @ v, dense_hessian(*arguments) @ v, **CLOSE)
    assert not on_the_host(A)


def test_nothing_stays_on_the_device(arguments):
    """Neither the data nor what graphs have saved, but for a product."""
    seen = []

    class Loader:
        def __iter__(self):
            for X, y in arguments[3]:
                seen.append(weakref.ref(X))
                yield X, y

    A = beyond_the_budget(HessianLinearOperator, (*arguments[:3], Loader()), host=20)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    A @ v
    del seen[:]
    A @ v
    gc.collect()
    number = N // BATCH
    assert number - len(on_the_host(A)) == 2
    # of those that were kept before, the data of this pass is not
    assert not any(ref() is not None for ref in seen)
    for rows in on_the_host(A):
        views = [saved.view for saved in rows._memory._living()]
        assert views
        assert all(view is None for view in views)
        assert rows.host_bytes > 0
        with rows._memory.on_device():
            assert all(saved.view is not None for saved in rows._memory._living())


def test_threads_share_what_is_on_the_device(arguments):
    A = beyond_the_budget(HessianLinearOperator, arguments, host=20)
    V = torch.randn(A.shape[1], 4, dtype=torch.float64)
    A @ V[:, 0]
    expected = dense_hessian(*arguments) @ V
    wrong = []

    def multiply(i):
        for _ in range(20):
            try:
                torch.testing.assert_close(A @ V[:, i], expected[:, i], **CLOSE)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=multiply, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shuffled_data_and_rows_in_order_are_computed_anew(arguments):
    loader = DataLoader(arguments[3].dataset, batch_size=BATCH, shuffle=True)
    A = beyond_the_budget(HessianLinearOperator, (*arguments[:3], loader), host=20)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    torch.testing.assert_close(A @ v, dense_hessian(*arguments) @ v, **CLOSE)
    assert not on_the_host(A)
    J = JacobianLinearOperator(
        arguments[0], arguments[2], arguments[3], memory_budget=1, host_memory_budget=1e9
    )
    J @ v
    assert not on_the_host(J)


def test_an_operator_on_a_cpu_uses_no_more_than_its_budget(arguments):
    A = HessianLinearOperator(*arguments, memory_budget=1)
    A @ torch.randn(A.shape[1], dtype=torch.float64)
    assert not A._maps._kept.maps
    with pytest.raises(TypeError, match="host_memory_budget is a number of bytes, got '1G"):
        HessianLinearOperator(*arguments, host_memory_budget="1GB")


def test_data_that_graphs_keep_alive_counts():
    """Batches of a loader are its own, and live as long as what is made of them."""
    X, y = torch.randn(40, 5000), torch.randn(40, 1)
    model = nn.Sequential(nn.AvgPool1d(1000), nn.Linear(5, 1))
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    arguments = model, nn.MSELoss(), list(model.parameters())
    budget = 3.5 * 4 * 5001 * 4
    A = GGNLinearOperator(*arguments, loader, memory_budget=budget)
    A @ torch.ones(A.shape[1])
    assert len(A._maps._kept.maps) == 3
    # those of a list live anyway
    A = GGNLinearOperator(*arguments, list(loader), memory_budget=budget)
    A @ torch.ones(A.shape[1])
    assert A._maps._kept.all


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("budget", [0, 12 << 20])
def test_memory_is_flat_from_the_first_batch_to_the_last(workers, budget):
    """40 batches of 4 MB, with linearizations of about as much."""
    pytest.importorskip("resource", reason="reads /proc")

    class Pixels(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.full((1, 1 << 20), float(i % 7)), torch.zeros(1, 1)

    model = nn.Sequential(nn.AvgPool1d(1 << 12), nn.Linear(1 << 8, 1))
    loader = DataLoader(Pixels(), batch_size=None, num_workers=workers)
    used = []

    def predict(params, X):
        used.append(resident())
        return torch.func.functional_call(model, params, (X,))

    params = dict(model.named_parameters())
    A = GGNLinearOperator(
        predict,
        nn.MSELoss(),
        params,
        loader,
        memory_budget=budget,
        check_deterministic=False,
    )
    for _ in range(2):
        del used[:]
        A @ torch.ones(A.shape[1])
    assert len(used) >= 40 - 3
    used = used[len(used) // 4 :]
    assert max(used) - min(used) < 32 << 20  # of 160


class _Square(torch.autograd.Function):
    """Whose Jacobian is computed by evaluating the model again in each product."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * ctx.saved_tensors[0]


class _Squares(nn.Module):
    def forward(self, x):
        return _Square.apply(x)


def test_what_evaluates_the_model_again_is_not_on_the_host(arguments, monkeypatch):
    monkeypatch.setattr(_hosting, "_PAYS", float("inf"))
    arguments[0][1] = _Squares()
    # for probabilities and targets of the batches, which stay on the device
    options = {"memory_budget": N * 5 * 8, "host_memory_budget": 1e9}
    A = GGNLinearOperator(*arguments, **options)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    expected = GGNLinearOperator(*arguments, cache=False) @ v
    for _ in range(3):
        torch.testing.assert_close(A @ v, expected, **CLOSE)
    assert not on_the_host(A)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_changes_of_data_that_somebody_holds_are_noticed(
    arguments, parts, behind, monkeypatch
):
    """As where all is on the device; ``behind``: the version counter."""
    monkeypatch.setattr(_hosting, "_PAYS", float("inf"))
    X, y = arguments[3].dataset.tensors
    batches = [
        (x.clone() if parts else x, t) for x, t in zip(X.split(6), y.split(6), strict=True)
    ]

    class Loader:
        def __iter__(self):
            for i, (x, t) in enumerate(batches):
                yield x if parts else X[6 * i : 6 * i + 6], t

    # for probabilities and targets of the batches, which stay on the device
    options = {"memory_budget": N * 5 * 8, "host_memory_budget": 1e9}
    A = GGNLinearOperator(*arguments[:3], Loader(), **options)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(2):  # the batch that was too much is linearized again
        before = A @ v
    assert len(on_the_host(A)) == len(batches)
    changed = batches[-1][0]
    (changed.data if behind else changed).mul_(3)
    expected = GGNLinearOperator(*arguments[:3], batches, cache=False) @ v
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(A @ v, expected, **CLOSE)
