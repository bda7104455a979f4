"""How a model is evaluated: as it is, wherever its parameters are, and never written to."""

from __future__ import annotations

import copy
import functools
import gc
import random
import signal
import threading
import types
import weakref

import numpy as np
import pytest
import torch
import torchlinop.autodiff.recording
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchlinop import (
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    WrongDerivativeError,
)

from tests.problems import classification, mlp

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def reference(model, params, data, loss=None):
    """Hessian and GGN by torch's own double backward on the user's model."""
    loss = nn.CrossEntropyLoss() if loss is None else loss
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    prediction = model(X)
    gradient = torch.autograd.grad(loss(prediction, y), params, create_graph=True)
    hessian = _jacobian([entry for g in gradient for entry in g.reshape(-1)], params)
    J = _jacobian(model(X).reshape(-1), params)
    leaf = prediction.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
    return hessian, J.T @ _jacobian(slope.reshape(-1), [leaf]) @ J


def _jacobian(outputs, inputs):
    rows = [
        torch.autograd.grad(o, inputs, retain_graph=True, allow_unused=True)
        for o in outputs
    ]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in zip(row, inputs, strict=True)
                ]
            )
            for row in rows
        ]
    )


def agrees(model, params, data, plain=None, **options):
    """Compare both matrices with those of ``plain``, the model without its disguise."""
    params = list(params)
    hessian, ggn = reference(model if plain is None else plain, params, data)
    for operator, dense in ((HessianLinearOperator, hessian), (GGNLinearOperator, ggn)):
        A = operator(model, nn.CrossEntropyLoss(), params, data, **options)
        torch.testing.assert_close(A.to_dense(), dense, **CLOSE)
        for v in torch.eye(len(dense), dtype=dense.dtype)[:6]:  # replayed at the end
            torch.testing.assert_close(A @ v, dense @ v, **CLOSE)
    assert hessian.abs().max() > 1e-3


@pytest.fixture
def data():
    torch.manual_seed(3)
    return [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (4, 2)]


# --------------------------------------------------------- where parameters may be


class Tied(nn.Module):
    """A decoder that is the encoder's transpose, and a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=False)
        self.decoder = nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(3, 3)

    def forward(self, X):
        hidden = torch.tanh(self.encoder(X)) @ self.decoder.weight
        return self.head(torch.tanh(self.decoder(torch.tanh(hidden))))


@pytest.mark.parametrize("chosen", ["head", "all", "tied"])
def test_tied_weights(data, chosen):
    model = Tied().double()
    params = {
        "head": list(model.head.parameters()),
        "all": list(model.parameters()),
        "tied": [model.encoder.weight],
    }[chosen]
    agrees(model, params, data)


class Shared(nn.Module):
    """A module that is registered under two names."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Sequential(self.inner, nn.Tanh())
        self.head = nn.Linear(3, 3)
        self.normal = nn.BatchNorm1d(3)
        self.outer.append(self.normal)

    def forward(self, X):
        return self.head(self.normal(self.outer(X) + self.inner(X)))


def test_a_module_under_two_names(data):
    model = Shared().double().eval()
    model.normal.running_mean += 0.3
    own = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    agrees(model, model.parameters(), data)
    agrees(model, model.inner.parameters(), data)
    for module, parameters, buffers in own:
        assert all(module._parameters[name] is p for name, p in parameters.items())
        assert all(module._buffers[name] is b for name, b in buffers.items())


class Hidden(nn.Module):
    """Layers that the module reaches on unusual ways."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)])
        self.pairs = [("first", self.layers[0])]  # in a plain list
        self.by_name = {"second": self.layers[1].forward}  # a bound method
        self.squash = lambda x: torch.tanh(x * self.scale)  # closes over the module
        self.finish = functools.partial(self._finish, self.layers[1].bias)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layers[0].parent = [self]  # a cycle

    def _finish(self, bias, x):
        return x + bias.square()

    def forward(self, X):
        x = self.squash(self.pairs[0][1](X)) * self.layers[0].parent[0].scale
        return self.finish(self.by_name["second"](x))


def test_modules_in_containers_methods_and_closures(data):
    model = Hidden().double()
    agrees(model, model.parameters(), data)


OUTSIDE: dict[str, nn.Module] = {}


class Elsewhere(nn.Module):
    """Uses a layer of its own through a global variable."""

    def __init__(self):
        super().__init__()
        OUTSIDE["layer"] = self.layer = nn.Linear(4, 3)

    def forward(self, X):
        layer = OUTSIDE["layer"]
        return torch.stack([torch.tanh(layer(X)), X @ layer.weight.T]).sum(0)


def test_parameters_reached_through_a_global_variable(data):
    model = Elsewhere().double()
    agrees(model, model.parameters(), data)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, X):
        return self.b(torch.tanh(self.a(X)))


class Slots(Body):
    __slots__ = ("__scale", "empty")

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "_Slots__scale", [self.b.bias])

    def forward(self, X):
        return super().forward(X) * self.__scale[0]


class Proxy(Body):
    """A child that knows its parent, and another one that is gone."""

    def __init__(self):
        super().__init__()
        vars(self.b)["parent"] = weakref.proxy(self)
        self.gone = [weakref.proxy(nn.Linear(1, 1)), weakref.ref(nn.Linear(1, 1))]
        self.lives = [weakref.proxy(Body.forward), self.b]
        self.b.forward = types.MethodType(Proxy._head, self.b)

    @staticmethod
    def _head(b, X):
        return nn.Linear.forward(b, X) * b.parent.a.bias


class Attributed(Body):
    def __init__(self):
        super().__init__()
        self.b.weight.factor = 2.0

    def forward(self, X):
        return super().forward(X) * self.b.weight.factor


@pytest.mark.parametrize("kind", [Slots, Proxy, Attributed])
def test_unusual_attributes(data, kind):
    model = kind().double()
    agrees(model, model.parameters(), data)


def test_a_parent_outside_of_the_model(data):
    parent = nn.ModuleList([Body(), nn.Linear(3, 3)]).double()
    model = parent[0]
    vars(model)["parent"] = weakref.ref(parent)
    model.forward = lambda X: model.parent()[1](Body.forward(model, X))
    agrees(model, model.parameters(), data)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def _kept(model):
    model.kept = model.b.bias.square()
    model.forward = lambda X: Body.forward(model, X) + model.kept
    return model


def _by_object(model):
    model.object = types.SimpleNamespace(bias=model.b.bias)
    model.forward = lambda X: Body.forward(model, X) + Square.apply(model.object.bias)
    return model


def _as_function(model):
    return lambda params, X: model(X)


@pytest.mark.parametrize("change", [_kept, _by_object, _as_function])
@pytest.mark.parametrize("check", [False, True])
def test_parameters_that_cannot_be_replaced(data, change, check):
    model = Body().double()
    params = dict(model.named_parameters())
    options = {"check_deterministic": check}
    changed = change(model)
    with pytest.raises(ValueError, match=r"depends on '.*' on a way on which no other"):
        HessianLinearOperator(
            changed, nn.CrossEntropyLoss(), params, data, **options
        ).to_dense()
    with pytest.raises(ValueError, match=r"depends on '.*' on a way on which no other"):
        JacobianLinearOperator(changed, params, data, **options).to_dense()


class Complex(nn.Module):
    """A spectral layer: complex weights behind a parameter of odd size."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.randn(3, 3, 2))
        self.linear = nn.Linear(4, 3)

    def forward(self, X):
        spectrum = torch.fft.rfft(torch.tanh(self.linear(X)) * self.scale, n=4)
        mixed = spectrum @ torch.view_as_complex(self.weight)
        return torch.fft.irfft(mixed, n=3)


def test_complex_weights_at_an_odd_place(data):
    model = Complex().double()
    agrees(model, model.parameters(), data)
    J = JacobianLinearOperator(model, list(model.parameters()), data)
    X = torch.cat([X for X, _ in data])
    dense = _jacobian(model(X).reshape(-1), list(model.parameters()))
    torch.testing.assert_close(J.to_dense(), dense, **CLOSE)
    torch.testing.assert_close(J.T.to_dense(), dense.T, **CLOSE)


# ---------------------------------------------------------------- wrapped models


class Block(nn.Module):
    def __init__(self, reentrant=None, compiled=False):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU())
        self.head = nn.Linear(3, 3)
        self.reentrant = reentrant
        if compiled:
            self.inner = torch.compile(self.inner, backend="eager")

    def forward(self, X):
        if self.reentrant is None:
            return self.head(self.inner(X))
        return self.head(checkpoint(self.inner, X, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(data, reentrant):
    model = Block(reentrant).double()
    plain = Block().double()
    plain.load_state_dict(model.state_dict())
    plain.inner, plain.head = model.inner, model.head
    agrees(model, model.parameters(), data, plain)
    agrees(model, model.parameters(), data, plain, cache=False)


def test_checkpoints_work_as_before_elsewhere(data):
    """In another thread that trains, and afterwards."""
    model, calls = Block(False).double(), []
    model.inner.register_forward_pre_hook(lambda *_: calls.append(1))

    def train():
        calls.clear()
        model(data[0][0]).sum().backward()
        return len(calls)

    assert train() == 2
    with torchlinop.autodiff.recording.recording(torch.device("cpu")):
        thread = threading.Thread(target=lambda: counts.append(train()))
        counts = []
        thread.start()
        thread.join()
    assert counts == [2]
    assert train() == 2


def _whole(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _method(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("wrap", [_whole, _in_place, _method, nn.DataParallel])
def test_wrapped_models(data, wrap):
    model = Block().double()
    plain = Block().double()
    plain.inner, plain.head = model.inner, model.head
    wrapped = wrap(model)
    agrees(wrapped, wrapped.parameters(), data, plain)
    named = dict(wrapped.named_parameters())
    H = HessianLinearOperator(wrapped, nn.CrossEntropyLoss(), named, data)
    assert H.space.names == tuple(named)
    dense = reference(plain, list(plain.parameters()), data)[0]
    torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


@pytest.mark.parametrize("wrap", [_whole, nn.DataParallel])
def test_hooks_and_attributes_of_wrappers(data, wrap):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, X):
            body = getattr(self.inner, "module", self.inner)
            return self.inner(X) + body.b(torch.sin(body.a(X)))

    def double(_, __, output):
        return 2 * output

    for nest in (Outer, lambda inner: inner):
        model, plain = nest(wrap(Body())).double(), nest(Body())
        for body in (getattr(model, "inner", model), getattr(plain, "inner", plain)):
            body.register_forward_hook(double)
        own, twin = list(model.parameters()), list(plain.parameters())
        plain.double().load_state_dict(dict(zip(plain.state_dict(), own, strict=True)))
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), own, data)
        dense = reference(plain, twin, data)[0]
        torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


def test_a_compiled_part(data):
    model = Block(compiled=True).double()
    plain = Block().double()
    plain.inner, plain.head = model.inner._orig_mod, model.head
    agrees(model, model.parameters(), data, plain)


def test_a_compiled_part_is_compiled_still(data):
    model = Block(compiled=True).double()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    H @ np.ones(H.shape[0])
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(model.head, backend=counter)(torch.ones(2, 3).double())
    assert counter.frame_count == 1


def test_a_scripted_model_is_refused(data):
    with pytest.warns(DeprecationWarning, match="deprecated"):
        model = torch.jit.trace(mlp(4, 3, 3), data[0][0])
    with pytest.raises(TypeError, match=r"The model is a TorchScript module.*traced"):
        HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)


def test_a_scripted_part_without_parameters_of_the_operator(data):
    with pytest.warns(DeprecationWarning, match="deprecated"):
        body = torch.jit.trace(mlp(4, 3), data[0][0])
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(3, 3).double())
    agrees(model, model[2].parameters(), data)


def test_a_dict_for_a_model_that_takes_keywords(data):
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, values, mask=None):
            return self.linear(values.clone())

    model = Keywords()
    batches = [({"values": X, "mask": None}, y) for X, y in data]
    with pytest.raises(TypeError, match=r"entries values, mask.*Wrap it.*model\(\*\*X\)"):
        HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), batches)


class Branches(Body):
    """Control flow on tensors, which torch itself differentiates once."""

    def forward(self, X):
        hidden = self.a(X)
        hidden = torch.cond(
            hidden.sum() > -99, lambda x: torch.tanh(x) * self.b.bias, torch.sin, (hidden,)
        )
        steps = (torch.tensor(0), hidden)
        loop = torch.ops.higher_order.while_loop
        _, hidden = loop(lambda i, _: i < 2, lambda i, x: (i + 1, x.sin()), steps, ())
        return self.b(hidden)


class Unbranched(Branches):
    def forward(self, X):
        return self.b(torch.sin(torch.sin(torch.tanh(self.a(X)) * self.b.bias)))


@pytest.mark.parametrize("check", [False, True])
def test_branches_and_loops(data, check):
    model, plain = Branches().double(), Unbranched().double()
    plain.a, plain.b = model.a, model.b
    agrees(model, model.parameters(), data, plain, check_deterministic=check)


# ------------------------------------------------------------------ random models


class Branch(nn.Module):
    """Stochastic depth behind a layer scale, as in ConvNeXt."""

    def __init__(self, keep, scale, source):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.keep, self.scale, self.source = keep, scale, source

    def forward(self, X):
        if self.training:
            kept = self.source(len(X)).to(X) < self.keep
            return self.head(X + self.scale * kept[:, None] * self.body(X))
        return self.head(X + self.scale * self.body(X))


SOURCES = {
    "torch": torch.rand,
    "numpy": lambda n: torch.from_numpy(np.random.rand(n)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("keep", [0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_random_branch_is_found(source, keep, dtype):
    torch.manual_seed(0)
    model = Branch(keep, 1e-6, SOURCES[source]).to(dtype)
    batches = [(torch.randn(16, 4, dtype=dtype), torch.randint(3, (16,)))]
    arguments = nn.CrossEntropyLoss(), list(model.parameters()), batches
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for operator in (HessianLinearOperator, GGNLinearOperator):
        with pytest.raises(ValueError, match="two different predictions"):
            operator(model, *arguments)
    with pytest.raises(ValueError, match="two different predictions"):
        JacobianLinearOperator(model, *arguments[1:])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    HessianLinearOperator(model.eval(), *arguments)


def test_a_random_loss_is_found(data):
    model = mlp(4, 3, 3)

    def loss(prediction, target):
        kept = nn.functional.dropout(prediction, 0.1, training=True)
        return nn.functional.cross_entropy(kept, target)

    with pytest.raises(ValueError, match="two different losses"):
        HessianLinearOperator(model, loss, model.parameters(), data, reduction="mean")


def test_random_numbers_without_effect(data):
    class Noise(nn.Module):
        def forward(self, X):
            return X + 0 * torch.rand_like(X)

    model = nn.Sequential(mlp(4, 3, 3), Noise()).double()
    arguments = (nn.CrossEntropyLoss(), list(model.parameters()), data)
    with pytest.raises(ValueError, match="draws random numbers in training mode"):
        HessianLinearOperator(model, *arguments)
    model.eval()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    dense = reference(model, list(model.parameters()), data)[0]
    torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


def test_what_a_forward_pass_registers_is_not_the_users(data):
    seen = []

    class Registers(Body):
        def forward(self, X):
            self.extra = nn.Parameter(torch.ones(3).double())
            self.register_buffer("kept", torch.ones(3).double(), persistent=False)
            self.a.register_forward_hook(lambda _, __, output: output.square())
            result = super().forward(X) * self.extra * self.kept
            seen.append((len(model.a._forward_hooks), [*vars(model)], [*model._buffers]))
            return result

    class Plain(Body):
        def forward(self, X):
            return self.b(torch.tanh(self.a(X).square()))

    model, plain = Registers().double(), Plain()
    plain.a, plain.b = model.a, model.b
    before = 0, [*vars(model)], []
    agrees(model, model.parameters(), data, plain)
    assert all(now == before for now in seen)
    assert not model._non_persistent_buffers_set


def test_random_states_stay(data):
    class Draws(Body):
        def forward(self, X):
            np.random.rand(), random.random(), torch.rand(1)
            return super().forward(X)

    def states():
        return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()

    model = Draws().double().eval()
    random.seed(0)
    before = states()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    H @ np.ones(H.shape[0])
    assert states() == before


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_and_go_are_noticed(data, register):
    model = mlp(4, 3, 3)
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    v = np.ones(H.shape[0])
    before = H @ v
    after = register == "register_forward_hook"
    handle = getattr(model[0], register)(
        (lambda _, X, out: 2 * out) if after else (lambda _, X: (3 * X[0],))
    )
    fresh = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    np.testing.assert_allclose(H @ v, fresh @ v, rtol=1e-10, atol=1e-13)
    assert np.abs(H @ v - before).max() > 1e-3
    handle.remove()
    np.testing.assert_allclose(H @ v, before, rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------- a risk is shared


def test_operators_share_a_risk():
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    H, G = HessianLinearOperator(risk), GGNLinearOperator(risk)
    F = FisherMCLinearOperator(risk, mc_samples=2)
    J = JacobianLinearOperator(risk)
    assert H.space is G.space is risk.space
    v = np.ones(27)
    for A in (H, G, F, J):
        A @ v
    with torch.no_grad():
        problem.params[0].mul_(1.5)
    looks = risk.looks
    fresh = [
        HessianLinearOperator(*problem.arguments),
        GGNLinearOperator(*problem.arguments),
        FisherMCLinearOperator(*problem.arguments, mc_samples=2),
        JacobianLinearOperator(problem.model, problem.params, problem.data),
    ]
    for _ in range(2):
        for A, B in zip((H, G, F, J), fresh, strict=True):
            np.testing.assert_allclose(A @ v, B @ v, rtol=1e-10, atol=1e-12)
    assert risk.looks == looks + 1  # one of them looked, for all


def test_a_jacobian_of_a_risk_whose_data_has_grown(data):
    model = mlp(4, 3, 3)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), model.parameters(), data)
    data.append(data[0])
    J = JacobianLinearOperator(risk)
    dense = _jacobian(
        model(torch.cat([X for X, _ in data])).reshape(-1), list(model.parameters())
    )
    torch.testing.assert_close(J.to_dense(), dense, **CLOSE)


class Orderly:
    """Data that begins to shuffle."""

    def __init__(self, batches):
        self.batches, self.shuffles = batches, False

    def __iter__(self):
        n = len(self.batches)
        order = torch.randperm(n).tolist() if self.shuffles else range(n)
        return (self.batches[i] for i in order)


@pytest.mark.parametrize("shared", [False, True])
def test_order_is_required_after_every_look(data, shared):
    many = Orderly([(X + i, y) for i in range(6) for X, y in data[:1]])
    model = mlp(4, 3, 3)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), model.parameters(), many)
    J = JacobianLinearOperator(risk)
    v = np.ones(J.shape[1])
    J @ v
    many.shuffles = True
    if shared:
        HessianLinearOperator(risk).refresh()
    else:
        with pytest.raises(ValueError, match="shuffle=False"):
            J.refresh()
    for _ in range(2):
        with pytest.raises(ValueError, match="shuffle=False"):
            J @ v


def test_a_risk_and_its_parts_are_refused(data):
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    with pytest.raises(TypeError, match="has its own data"):
        HessianLinearOperator(risk, data=data)
    with pytest.raises(TypeError, match="has its own cache"):
        GGNLinearOperator(risk, cache=False)
    with pytest.raises(TypeError, match="Missing params, data"):
        GGNLinearOperator(problem.model, problem.loss)
    with pytest.raises(TypeError, match=r"'cahce'\. The options are batch_size, cac"):
        GGNLinearOperator(*problem.arguments, cahce=True)


# ------------------------------------------------- the user's module stays the user's


class InterruptError(Exception):
    """Not caught by anything on the way."""


def _interrupted(run, seconds):
    """Run until a signal falls somewhere; whether it did."""

    def handler(*_):
        raise InterruptError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        run()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except InterruptError:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def test_interrupts_at_any_moment(rng):
    """A thousand of them: the module's tensors are its own, and products are right."""
    problem = classification()
    slots = [
        (m._parameters, n, p)
        for m in problem.model.modules()
        for n, p in m._parameters.items()
    ]
    H = HessianLinearOperator(*problem.arguments, cache=False)
    v = np.ones(27)
    expected = H @ v
    hits = 0
    gc.disable()  # its callbacks are not ours to guard
    try:
        for _ in range(1000):
            run = H._maps.refresh if hits % 3 == 0 else lambda: H @ v
            hits += _interrupted(run, rng.uniform(1e-5, 2e-3))
            assert all(slots[name] is p for slots, name, p in slots)
    finally:
        gc.enable()
    assert hits > 300
    np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)
    free = []
    thread = threading.Thread(target=lambda: free.append(H @ v))
    thread.start()
    thread.join(timeout=30)
    assert len(free) == 1  # no lock is held


def test_training_while_an_operator_records():
    """Gradients of another thread reach the parameters that it trains."""
    problem = classification()
    X, y = problem.data[0]
    stop, lost = threading.Event(), []

    def train():
        while not stop.is_set():
            problem.model.zero_grad(set_to_none=True)
            problem.loss(problem.model(X), y).backward()
            lost.append(any(p.grad is None for p in problem.params))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        H = HessianLinearOperator(*problem.arguments, cache=False)
        while len(lost) < 1500:
            H @ np.ones(27)
    finally:
        stop.set()
        thread.join()
    assert not any(lost)


# ------------------------------------------------------------------------- refresh


def test_refresh_while_others_multiply():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    v, stop, errors = np.ones(27), threading.Event(), []
    expected = H @ v

    def multiply():
        try:
            while not stop.is_set():
                np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        H.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_refresh_that_fails_changes_nothing():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    v = np.ones(27)
    expected, nbytes = H @ v, H._maps.nbytes
    problem.data.append("nonsense")
    with pytest.raises(TypeError, match="has to be a pair"):
        H.refresh()
    problem.data.pop()
    assert H._maps.nbytes == nbytes > 0
    np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)


# ------------------------------------------------------------- derivatives by users


class Kernel(torch.autograd.Function):
    """Squares whose backward pass keeps a NumPy array: right once, a constant then."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().numpy().copy()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * torch.from_numpy(ctx.kept)


class Detached(Kernel):
    """Not differentiable in the cotangent, so that J v is lost, too."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(2 * g.detach().numpy() * ctx.kept)


class Plain:
    apply = staticmethod(torch.square)


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.head, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, X):
        hidden = self.linear(X)
        return self.head(torch.tanh(hidden) + 0.3 * self.function.apply(hidden))


@pytest.mark.parametrize("cache", ["auto", False])
def test_wrong_second_derivatives_of_users_are_found(data, cache):
    model = Squares(Kernel).double()
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    H = HessianLinearOperator(*arguments, cache=cache)
    with pytest.raises(WrongDerivativeError, match=r"% off .* Kernel, .*check_derivatives"):
        H @ np.ones(H.shape[0])
    G = GGNLinearOperator(*arguments, cache=cache)  # needs no second derivative of it
    v = torch.ones(G.shape[0]).double()
    plain = copy.deepcopy(model)
    plain.function = Plain
    dense = reference(plain, list(plain.parameters()), data)[1]
    torch.testing.assert_close(G @ v, dense @ v, **CLOSE)
    unchecked = HessianLinearOperator(*arguments, cache=cache, check_derivatives=False)
    unchecked @ np.ones(H.shape[0])


def test_wrong_jacobians_of_users_are_found(data):
    model = Squares(Detached).double()
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    for operator in (GGNLinearOperator, FisherMCLinearOperator):
        A = operator(*arguments)
        with pytest.raises(WrongDerivativeError, match=r"The derivative .* Detached"):
            A @ np.ones(A.shape[0])
    J = JacobianLinearOperator(model, arguments[2], data)
    with pytest.raises(WrongDerivativeError, match=r"The derivative .* Detached"):
        J @ np.ones(J.shape[1])
