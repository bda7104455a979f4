"""Whatever a product depends on may change; the next product is that of the new state."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import (
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop._watch import Watch
from torchlinop.reference import dense_ggn, dense_hessian, dense_jacobian

from tests.problems import classification

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


class WithBuffer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.inner(x)


@pytest.fixture
def problem():
    problem = classification(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])))
    model = WithBuffer(problem.model)
    return problem._replace(model=model, params=list(model.parameters()))


def _optimizer_step(problem):
    optimizer = torch.optim.SGD(problem.params, lr=0.3)
    for p in problem.params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def _through_data(problem):
    problem.params[0].data.mul_(1.1)


def _one_bit(problem):
    """The smallest change there is, past the version counter."""
    flat = problem.params[0].data.view(-1).numpy()
    flat[0] = np.nextafter(flat[0], np.inf)


def _permuted(problem):
    problem.params[0].data.copy_(problem.params[0].data.flip(0))


def _new_storage(problem):
    problem.params[1].data = torch.full_like(problem.params[1].data, 0.3)


def _load_state_dict(problem):
    state = copy.deepcopy(problem.model.state_dict())
    problem.model.load_state_dict({k: 0.5 * v for k, v in state.items()})


def _buffer(problem):
    problem.model.scale.mul_(2)


def _input(problem):
    problem.data[1][0].add_(0.5)


def _input_through_numpy(problem):
    problem.data[0][0].numpy()[...] *= 0.7


def _target(problem):
    problem.data[0][1].copy_(2 - problem.data[0][1])


def _loss_weight(problem):
    problem.loss.weight.mul_(torch.tensor([1.0, 3.0, 1.0]))


def _list_entry(problem):
    X, y = problem.data[0]
    problem.data[0] = (2 * X, y)


def _longer_list(problem):
    problem.data.append(problem.data[0])


def _sign(problem):
    problem.params[0].data.neg_()


def _replaced_layer(problem):
    problem.model.inner[1] = nn.Sigmoid()


def _label_smoothing(problem):
    problem.loss.label_smoothing = 0.3


CHANGES = [
    _list_entry,
    _sign,
    _replaced_layer,
    _label_smoothing,
    _optimizer_step,
    _through_data,
    _permuted,
    _new_storage,
    _load_state_dict,
    _buffer,
    _input,
    _input_through_numpy,
    _target,
    _loss_weight,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("products", [0, 1, 6], ids=["built", "recorded", "replayed"])
@pytest.mark.parametrize("cache", ["auto", False], ids=["kept", "recomputed"])
def test_change_is_noticed(problem, change, products, cache):
    H = HessianLinearOperator(*problem.arguments, cache=cache)
    G = GGNLinearOperator(*problem.arguments, cache=cache)
    J = JacobianLinearOperator(problem.model, problem.params, problem.data, cache=cache)
    x = torch.ones(H.shape[0], dtype=torch.float64)
    before = [[A @ x for _ in range(products)][-1] for A in (H, G, J)] if products else []
    change(problem)
    after = [
        dense_hessian(*problem.arguments) @ x,
        dense_ggn(*problem.arguments) @ x,
        dense_jacobian(problem.model, problem.params, problem.data) @ x,
    ]
    if products:
        assert (after[0] - before[0]).norm() > 1e-3 * before[0].norm()
    for A, y in zip((H, G, J), after, strict=True):
        torch.testing.assert_close(A @ x, y, **CLOSE)


def test_the_smallest_change_is_noticed(problem):
    watch = Watch(problem.params)
    assert not watch.changed()
    _one_bit(problem)
    assert watch.changed()


@pytest.mark.parametrize("size", [3, 16_384, 16_385, 40_003])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_every_entry_is_watched(size, where):
    tensor = torch.zeros(size)
    watch = Watch([tensor])
    tensor.numpy()[where] = 1e-30
    assert watch.changed()


def test_strange_tensors_are_watched():
    base = torch.arange(40_000.0).reshape(200, 200)
    for tensor in (
        base.bfloat16()[:, ::2],
        base.to(torch.complex64).conj(),
        base.T,
        base[:, ::2],
        base[::2].T,
        base[1:, 1:],
        base.reshape(-1)[1:],
    ):
        watch = Watch([tensor])
        assert not watch.changed()
        kept = tensor[1].clone()
        tensor.detach().data[1] += 1
        assert watch.changed()
        tensor.data[1] = kept


def test_nothing_is_rebuilt_without_a_change(problem):
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(1))
    H = HessianLinearOperator(*problem.arguments)
    for _ in range(3):  # the third product joins small batches
        H @ np.ones(H.shape[0])
    count = len(calls)
    for _ in range(6):
        H @ np.ones(H.shape[0])
    assert len(calls) == count
    _through_data(problem)
    H @ np.ones(H.shape[0])
    assert len(calls) > count


def test_replaced_parameter_is_an_error(problem):
    H = HessianLinearOperator(*problem.arguments)
    H @ np.ones(H.shape[0])
    problem.model.inner[0].weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="not the model's own"):
        H @ np.ones(H.shape[0])


def test_training_mode_after_construction_is_an_error():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    data = [(torch.randn(5, 4).double(), torch.randint(3, (5,)))]
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    y = G @ np.ones(G.shape[0])
    model.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        G @ np.ones(G.shape[0])
    model.eval()
    np.testing.assert_allclose(G @ np.ones(G.shape[0]), y, rtol=1e-10, atol=1e-13)


def test_refresh_after_a_change_that_cannot_be_seen(problem):
    problem.model.factor = 1.0
    problem.model.register_forward_hook(lambda module, _, out: module.factor * out)
    H = HessianLinearOperator(*problem.arguments)
    H @ np.ones(H.shape[0])
    problem.model.factor = 2.0
    H.refresh()
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)


def _loader(problem, **options):
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    return DataLoader(TensorDataset(X, y), batch_size=2, **options)


@pytest.mark.parametrize("budget", [0.1, 2.5, None], ids=["none", "some", "all"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_memory_budget(problem, budget, shuffle):
    """Batches that are kept and batches that are not add up to the same matrix."""
    loader = _loader(problem, shuffle=shuffle)
    arguments = problem.model, problem.loss, problem.params
    one = HessianLinearOperator(*arguments, [next(iter(loader))])
    one @ np.ones(one.shape[0])
    budget = None if budget is None else int(budget * one._maps.nbytes)
    H = HessianLinearOperator(*arguments, loader, memory_budget=budget)
    expected = dense_hessian(*problem.arguments)
    for _ in range(6):
        x = torch.randn(H.shape[0], dtype=torch.float64)
        torch.testing.assert_close(H @ x, expected @ x, **CLOSE)
    kept = len(H._maps._kept.maps)
    if budget is None:
        assert H._maps._kept.all
    elif budget > one._maps.nbytes and not shuffle:
        assert 0 < kept < 5
    else:
        assert kept == 0


def test_shuffled_data_is_refused_where_order_matters(problem):
    loader = _loader(problem, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        FisherMCLinearOperator(problem.model, problem.loss, problem.params, loader)
    with pytest.raises(ValueError, match="shuffle=False"):
        JacobianLinearOperator(problem.model, problem.params, loader)


def test_shuffling_by_other_means_is_noticed(problem):
    class Shuffled:
        def __iter__(self):
            order = torch.randperm(50)
            return iter([(torch.ones(1, 4).double() * i, torch.tensor([1])) for i in order])

    with pytest.raises(ValueError, match="another order in every pass"):
        FisherMCLinearOperator(problem.model, problem.loss, problem.params, Shuffled())


def test_the_users_model_is_left_alone(problem):
    """Gradients, flags, hooks, random state and values are those from before."""
    model = problem.model
    problem.params[0].grad = torch.ones_like(problem.params[0])
    problem.params[1].requires_grad_(False)
    model.train()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    for operator in (HessianLinearOperator, GGNLinearOperator, FisherMCLinearOperator):
        A = operator(*problem.arguments)
        for _ in range(6):
            A @ np.ones(A.shape[0])
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(problem.params[0].grad, torch.ones_like(problem.params[0]))
    assert [p.grad is None for p in problem.params[1:]] == [True] * 3
    assert [p.requires_grad for p in problem.params] == [True, False, True, True]
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_batch_statistics_are_not_updated():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().train()
    data = [(torch.randn(5, 4).double(), torch.randint(3, (5,)))]
    state = copy.deepcopy(model.state_dict())
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    H = HessianLinearOperator(*arguments, check_deterministic=False)
    matrix = H.to_dense()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    # torch.func itself gives an unsymmetric matrix here (torch 2.13)
    twin = copy.deepcopy(model)
    params = list(twin.parameters())
    loss = arguments[1](twin(data[0][0]), data[0][1])
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    rows = [
        torch.autograd.grad(entry, params, retain_graph=True)
        for entry in torch.cat([g.reshape(-1) for g in gradient])
    ]
    expected = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
    torch.testing.assert_close(matrix, expected, **CLOSE)


def test_a_list_that_grows(problem):
    H = HessianLinearOperator(*problem.arguments)
    J = JacobianLinearOperator(problem.model, problem.params, problem.data)
    H @ np.ones(27), J @ np.ones(27)
    _longer_list(problem)
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)
    with pytest.raises(RuntimeError, match=r"gives 42 outputs .* it gave 27"):
        J @ np.ones(27)
    with pytest.raises(RuntimeError, match=r"gives 42 outputs .* it gave 27"):
        J.T @ np.ones(27)


def test_signs_of_large_tensors_are_watched():
    """Of 64-bit words, flipped sign bits cancel in a sum."""
    for dtype in (torch.float32, torch.float64):
        tensor = torch.randn(100, 1000, dtype=dtype)
        watch = Watch([tensor])
        tensor.data.neg_()
        assert watch.changed()


def test_data_behind_a_loader_is_watched(problem):
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    H = HessianLinearOperator(problem.model, problem.loss, problem.params, loader)
    H @ np.ones(H.shape[0])
    X.mul_(2)
    expected = dense_hessian(problem.model, problem.loss, problem.params, [(X, y)])
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)


def test_weight_and_bias_that_were_none():
    problem = classification(nn.CrossEntropyLoss())
    layer = nn.Linear(4, 3, bias=False).double()
    H = HessianLinearOperator(layer, problem.loss, [layer.weight], problem.data)
    H @ np.ones(12)
    problem.loss.weight = torch.tensor([1.0, 2.0, 0.5]).double()
    expected = dense_hessian(layer, problem.loss, [layer.weight], problem.data)
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)
    layer.bias = nn.Parameter(torch.ones(3).double())
    expected = dense_hessian(layer, problem.loss, [layer.weight], problem.data)
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)


def test_mode_of_the_users_own_module_is_watched():
    class Switch(nn.Module):
        def forward(self, x):
            return x if self.training else 2 * x

    model = nn.Sequential(nn.Linear(4, 3), Switch()).double()
    data = classification().data
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    G = GGNLinearOperator(*arguments)
    G @ np.ones(15)
    model.eval()
    torch.testing.assert_close(G.to_dense(), dense_ggn(*arguments), **CLOSE)


def test_buffers_written_in_the_forward_pass_stay():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    model = Counting().double().eval()
    H = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), model.parameters(), classification().data
    )
    H @ np.ones(15)
    assert model.calls == 0


def test_renormalized_embedding_stays():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 2))
    before = model[0].weight.detach().clone()
    data = [(torch.randint(5, (4, 2)), torch.randint(2, (4,)))]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    H.to_dense()
    assert torch.equal(model[0].weight, before)


def test_a_loader_does_not_move_the_global_random_state(problem):
    loader = _loader(problem)
    state = torch.get_rng_state()
    F = FisherMCLinearOperator(problem.model, problem.loss, problem.params, loader)
    F @ np.ones(F.shape[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_building_in_threads_leaves_the_model_whole():
    problem = classification()
    expected = dense_ggn(*problem.arguments)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    shared = GGNLinearOperator(*problem.arguments)
    results = []

    def work():
        own = GGNLinearOperator(*problem.arguments)
        results.extend([own.to_dense(), shared.to_dense()])

    try:
        for _ in range(3):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == 24
    for matrix in results:
        torch.testing.assert_close(matrix, expected, **CLOSE)
    assert all(type(p) is nn.Parameter for p in problem.model.parameters())


def test_an_operator_is_freed_without_the_cyclic_collector(problem):
    gc.collect()
    gc.disable()
    try:
        for operator in (HessianLinearOperator, GGNLinearOperator):
            A = operator(*problem.arguments)
            for _ in range(6):
                A @ np.ones(A.shape[0])
            kept = weakref.ref(next(iter(A._maps._kept.maps.values())))
            del A
            assert kept() is None
    finally:
        gc.enable()


def test_layers_that_are_added():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    H @ np.ones(27)
    problem.model.append(nn.Sigmoid())
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)


def test_entries_of_a_list_of_inputs():
    w = torch.randn(4, 3).double()
    X, y = classification().data[0]

    def model(params, X):
        return X[0] @ params[0]

    data = [([X], y)]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), [w], data)
    H @ np.ones(12)
    data[0][0][0] = 2 * X
    fresh = HessianLinearOperator(model, nn.CrossEntropyLoss(), [w], data)
    torch.testing.assert_close(H.to_dense(), fresh.to_dense())


def test_an_error_in_one_thread_blocks_no_other():
    """The lock is released although the exception, and its frames, are kept."""

    class Fails(nn.Module):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("only in the other thread")
            return x

    problem = classification()
    model = nn.Sequential(problem.model, Fails())
    H = HessianLinearOperator(model, problem.loss, problem.params, problem.data)
    caught = []

    def work():
        try:
            H @ np.ones(27)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "only in the other thread" in str(caught[0])
    done = []
    other = threading.Thread(
        target=lambda: done.append(GGNLinearOperator(*problem.arguments))
    )
    other.start()
    other.join(timeout=60)
    assert done
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)


@pytest.mark.parametrize("transposed", [False, True])
def test_unkept_jacobians_live_one_at_a_time(problem, transposed):
    J = JacobianLinearOperator(problem.model, problem.params, problem.data, cache=False)
    A = J.T if transposed else J
    linearizer, living, most = J._maps._linearizer, weakref.WeakSet(), []
    build = linearizer.linearize

    def counted(batch):
        linear_map = build(batch)
        living.add(linear_map)
        most.append(len(living))
        return linear_map

    linearizer.linearize = counted
    A @ np.ones((A.shape[1], 2))
    assert len(most) == 3
    assert max(most) <= 2
