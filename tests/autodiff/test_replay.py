"""Replayed kernels give what the function gives, and know when they cannot."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torchlinop.autodiff.columns import WARM_UP, LinearRows
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.replay import record

N = 12
MATRIX = torch.linspace(-1, 1, N * N, dtype=torch.float64).view(N, N)
INDEX = torch.tensor([3, 1, 1, 0, 2, 5, 6, 7, 8, 9, 11, 10])
SCALE = torch.linspace(1, 2, N, dtype=torch.float64)
TINY = torch.full((N,), 1e-170, dtype=torch.float64)

LIBRARY = torch.library.Library("replay_test", "DEF")
LIBRARY.define("nested(Tensor x) -> (Tensor, Tensor[])")
LIBRARY.impl(
    "nested", lambda x: (x.new_ones(1), [x * 2, x * 3]), "CompositeExplicitAutograd"
)
NESTED = torch.ops.replay_test.nested.default


def _written_buffer(x):
    buffer = torch.zeros(N, 2, dtype=x.dtype)
    buffer[:, 0] = x
    buffer[2:4, 1] += x[:2]
    return buffer.sum(1)


def _written_constant(x):
    """A buffer that is read, then written without x, then read again."""
    buffer = torch.ones(N, dtype=x.dtype)
    first = x * buffer
    buffer.mul_(3)
    return first + x * buffer


def _written_copy(x):
    """A copy of what was there before, which is read, written, and read again."""
    copy = torch.ops.aten.mul.Scalar(SCALE, 1)
    first = x * copy
    copy.mul_(3)
    return first + x * copy


MEMORY = torch.ones(N, dtype=torch.float64)


def _outside_memory(x):
    MEMORY.copy_(x)
    MEMORY[:2].mul_(3)
    return MEMORY + x


def _writes_without_a_result(x):
    y = x.clone()
    torch._foreach_mul_([y], 2.0)
    return y


def _memory_of_another(x):
    y, z = x.new_empty(0), 2 * x
    y.set_(z)
    y.view(3, 4).mul_(3)
    return y + z


def _several_outputs(x):
    a, b, c = x.split([4, 4, 4])
    return torch.cat([c, a * 2, b])


FUNCTIONS = {
    "product": lambda x: MATRIX @ x,
    "chain of factors": lambda x: ((x * SCALE) * 2) * (SCALE * SCALE) * SCALE,
    "shared factor": lambda x: (y := x * SCALE) * SCALE + y,
    "broadcast factors": lambda x: (x * SCALE[:, None] * SCALE).sum(0),
    "factor that grows": lambda x: ((x[:1] * SCALE[:1]) * SCALE).clone(),
    "transposes": lambda x: (MATRIX @ x.view(3, 4).t().t().reshape(-1, 1)).t().t().view(-1),
    "zero": lambda x: x + torch.zeros_like(x) + 0 * SCALE,
    "zero that broadcasts": lambda x: x[:1] + torch.zeros(N, dtype=x.dtype),
    "bias": lambda x: (x[:3].expand(4, 3) + x.view(4, 3) @ MATRIX[:3, :3]).reshape(-1),
    "sum of products": lambda x: (
        MATRIX @ x.view(N, 1) + MATRIX.T @ (2 * x).view(N, 1)
    ).view(-1),
    "difference": lambda x: torch.sub(SCALE * x, x, alpha=3),
    "weighted sum": lambda x: torch.add(x, MATRIX @ x, alpha=0.5),
    "concatenated products": lambda x: torch.cat(
        [
            (MATRIX[:3, :3] @ x.view(3, 4)).view(-1),
            x[:2] * 3,
            (MATRIX[:2, :3] @ x.view(3, 4) + SCALE[:4]).view(-1),
        ]
    ),
    "concatenated and used": lambda x: torch.cat(
        [(y := MATRIX[:3, :3] @ x.view(3, 4)).view(-1), y.sum().view(1)]
    ),
    "concatenated twice": lambda x: torch.cat(
        [(y := (MATRIX[:3, :3] @ x.view(3, 4)).view(-1)), y]
    ),
    "written buffer": _written_buffer,
    "written constant": _written_constant,
    "several outputs": _several_outputs,
    "identity": lambda x: x.clone(),
    "cumulated": lambda x: x.flip(0).cumsum(0).roll(2),
    "gather": lambda x: x[INDEX],
    "constant": lambda x: 0 * x + 0,
    "by position": lambda x: (2 * x).as_strided((3,), (2,), 1) + x[:3],
    "zero, then a view": lambda x: (x + torch.zeros_like(SCALE)).view(3, 4).view(-1),
    "factors that underflow": lambda x: (x * 1e200).flip(0) * TINY * TINY / 1e-140,
    "zero, then by position": lambda x: (
        (torch.zeros(4, 3, dtype=x.dtype) + (2 * x).view(3, 4).t()).as_strided((5,), (1,))
        * 1
    ),
    "nested results": lambda x: NESTED(x)[1][1] * NESTED(x)[0],
    "written copy": _written_copy,
    "outside memory": _outside_memory,
    "writes without a result": _writes_without_a_result,
    "memory of another": _memory_of_another,
}


def replay_of(function, x):
    """Return the replay, after the check that recording gives the function's value."""
    y, unchecked = record(function, x)
    torch.testing.assert_close(y, function(x), rtol=1e-13, atol=1e-13)
    if unchecked is None:
        return None
    z = (x * torch.arange(len(x))).sin()
    y, replay = unchecked.compared(function, z)
    torch.testing.assert_close(y, function(z), rtol=1e-13, atol=1e-13)
    return replay


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_equals_function(name):
    function = FUNCTIONS[name]
    replay = replay_of(function, torch.randn(N, dtype=torch.float64))
    for _ in range(4):
        x = torch.randn(N, dtype=torch.float64)
        kept = x.clone()
        y = replay.run(x)
        torch.testing.assert_close(y, function(x), rtol=1e-13, atol=1e-13)
        y.fill_(torch.nan)  # must reach neither the argument nor the next product
        assert torch.equal(x, kept)


def test_numbers_that_underflow_together_stay_apart():
    x = torch.full((2,), 1e200, dtype=torch.float64)
    replay = replay_of(lambda x: x * 1e-200 * 1e-200, x)
    torch.testing.assert_close(
        replay.run(x), torch.full_like(x, 1e-200), rtol=1e-13, atol=0
    )


def test_product_of_a_recorded_gradient():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.ReLU())
    net = nn.Sequential(
        net, nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten()
    ).double()
    params = list(net.parameters())
    loss = net(torch.tensor([[0, 1], [1, 4]])).square().sum()
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    sizes = [p.numel() for p in params]

    def product(v):
        parts = [x.view(p.shape) for x, p in zip(v.split(sizes), params, strict=True)]
        rows = torch.autograd.grad(gradient, params, parts, retain_graph=True)
        return torch.cat([r.reshape(-1) for r in rows])

    v = torch.randn(sum(sizes), dtype=torch.float64)
    replay = replay_of(product, v)
    for _ in range(3):
        v = torch.randn_like(v)
        torch.testing.assert_close(replay.run(v), product(v), rtol=1e-13, atol=1e-13)


def test_kernels_without_the_argument_run_once():
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    replay = replay_of(lambda x: x * (MATRIX @ SCALE).exp().sin(), SCALE.clone())
    with Counting():
        replay.run(SCALE)
    assert [str(f) for f in calls] == ["aten.mul.Tensor"]


def _through_numpy(x):
    MEMORY.numpy()[:] = x.numpy()
    return x + MEMORY * 2


def _refused_below_a_recorder():
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise MemoryError
    return 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),  # a value is read back
        lambda x: x.as_strided((3,), (2,), 1) * 2,  # memory by position
        lambda x: torch.zeros(3, dtype=x.dtype),  # independent of the argument
        lambda x: x.to_sparse().to_dense() * 1,
        lambda x: x * torch.from_numpy(x.numpy() * 0 + x.numpy().sum()),  # not seen
        lambda x: x * (1 + 1e-9 * float(x.numpy().sum())),  # a number that is not seen
        lambda x: x * (2 + 0 * torch.equal(x, TINY)),
        _through_numpy,
        lambda x: x.view(3, 4).view(-1),  # not memory of its own
        lambda x: x + 1e-14 * (x * 2).as_subclass(torch.Tensor),  # a view that is not seen
        lambda x: x * _refused_below_a_recorder(),
    ],
    ids=[
        "item",
        "as_strided",
        "constant",
        "sparse",
        "numpy",
        "number",
        "equal",
        "written by numpy",
        "view",
        "subclass",
        "error",
    ],
)
def test_what_cannot_be_replayed_is_called(function):
    assert replay_of(function, SCALE.clone()) is None
    rows = LinearRows(lambda x, batched=False: function(x), nbytes=0, nodes=1)
    experience = Experience()
    for _ in range(WARM_UP + 3):
        x = torch.randn(N, dtype=torch.float64)
        torch.testing.assert_close(rows.row(x, experience), function(x))
    assert rows.replay_bytes == 0


def test_a_function_that_changes_is_not_replayed():
    state = [1.0]

    def function(x):
        state[0] += 1
        return x * state[0]

    _, unchecked = record(function, SCALE.clone())
    assert unchecked.compared(function, SCALE.flip(0))[1] is None


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    for x in (SCALE, 0 * SCALE):
        assert replay_of(FUNCTIONS["product"], x) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_constants_that_a_replay_holds_are_counted():
    function = FUNCTIONS["chain of factors"]
    assert record(function, SCALE.clone())[1].nbytes == N * SCALE.itemsize
    assert record(FUNCTIONS["product"], SCALE.clone())[1].nbytes == 0  # was there before
    x = torch.rand(1000, dtype=torch.float64)
    old = torch.rand_like(x)  # of which addcmul's derivative makes a copy
    assert replay_of(lambda x: x * torch.ops.aten.mul.Scalar(old, 1), x).nbytes == 0


def _unit(i):
    return torch.eye(N, dtype=torch.float64)[i]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SCALE, SCALE),
        (SCALE, SCALE + 1e-14),
        (_unit(0), 0 * SCALE),
        (_unit(0), _unit(1)),
        (_unit(0), torch.full((N,), torch.nan, dtype=torch.float64)),
        (SCALE, torch.cat([SCALE.flip(0)[: N // 2], SCALE[N // 2 :]])),
    ],
    ids=["same", "similar", "zero", "few entries", "not a number", "the same part"],
)
def test_a_replay_is_compared_at_a_vector_that_tells(first, second):
    def function(x):  # a number that is not seen looks like a constant
        return x * SCALE + float(x.numpy()[-1]) * SCALE

    first = first.clone()  # not the constant itself
    assert record(function, first)[1].compared(function, second)[1] is None
    replay = record(FUNCTIONS["product"], first)[1].compared(FUNCTIONS["product"], second)
    assert replay[1] is not None


def test_recording_keeps_no_temporary():
    alive = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            alive.append(weakref.ref(result))
            return result

    def function(x):
        with Watching():  # below the recorder
            for _ in range(5):
                x = x * SCALE
                most.append(sum(r() is not None for r in alive))
        return x

    most = []
    record(function, SCALE.clone())
    assert max(most[:5]) == 1
