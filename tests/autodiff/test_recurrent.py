"""Recurrent networks: every matrix is that of cells written out in a loop."""

from __future__ import annotations

import runpy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torchlinop import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator
from torchlinop.autodiff.graphs import edges_of, nodes_between
from torchlinop.autodiff.linearize import forward_derivative
from torchlinop.autodiff.replay import record
from torchlinop.autodiff.replay.recording import record_calls
from torchlinop.autodiff.rules import SecondOrderRules, recurrences
from torchlinop.reference import dense_ggn, dense_hessian

from .differences import check

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supp")


# ---------------------------------------------------------------- cells, written out


def one_step(net, x, states, weight, recurrent, bias, recurrent_bias, projection):
    """One step of one sequence, by the formulas in torch's documentation."""
    a, b = weight @ x + bias, recurrent @ states[0] + recurrent_bias
    if isinstance(net, nn.LSTM):
        i, f, g, o = (a + b).chunk(4)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if projection is None else projection @ h), c
    if isinstance(net, nn.GRU):
        (r, z, n), (br, bz, bn) = a.chunk(3), b.chunk(3)
        r, z = (r + br).sigmoid(), (z + bz).sigmoid()
        return ((1 - z) * (n + r * bn).tanh() + z * states[0],)
    return ((a + b).tanh() if net.nonlinearity == "tanh" else (a + b).relu(),)


def one_sequence(net, x, states):
    """Output and final states of one sequence ``(T, n)``."""
    finals, layer = [], 0
    for number in range(net.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + net.bidirectional]:
            names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
            tensors = [getattr(net, f"{n}_l{number}{suffix}", None) for n in names]
            zero = tensors[0].new_zeros(len(tensors[0]))
            tensors[2:4] = [zero if t is None else t for t in tensors[2:4]]
            s, steps = [state[layer] for state in states], []
            for step in reversed(x) if suffix else x:
                s = one_step(net, step, s, *tensors)
                steps.append(s[0])
            outputs.append(torch.stack(steps[::-1] if suffix else steps))
            finals.append(s)
            layer += 1
        x = torch.cat(outputs, -1)
    return x, [torch.stack(s) for s in zip(*finals, strict=True)]


def written_out(net, sequences, states):
    """Outputs and final states of several sequences, one after the other."""
    if states is None:
        sizes = [getattr(net, "proj_size", 0) or net.hidden_size, net.hidden_size]
        count = net.num_layers * (1 + net.bidirectional)
        zeros = [net.weight_hh_l0.new_zeros(count, len(sequences), n) for n in sizes]
        states = zeros[: 1 + isinstance(net, nn.LSTM)]
    results = [
        one_sequence(net, x, [s[:, i] for s in states]) for i, x in enumerate(sequences)
    ]
    finals = zip(*(f for _, f in results), strict=True)
    return [y for y, _ in results], [torch.stack(s, 1) for s in finals]


def by_torch(net, sequences, states, *, packed, single):
    """The same by torch, in one of the forms in which it takes sequences."""
    if states is not None:
        states = tuple(states) if isinstance(net, nn.LSTM) else states[0]
    axis = 0 if net.batch_first else 1
    if packed:
        y, finals = net(pack_sequence(sequences, enforce_sorted=False), states)
        outputs = unpack_sequence(y)
    elif single:
        y, finals = net(sequences[0], states)
        outputs = [y]
    else:
        y, finals = net(torch.stack(sequences, axis), states)
        outputs = y.unbind(axis)
    finals = finals if isinstance(finals, tuple) else (finals,)
    return outputs, [f.unsqueeze(1) for f in finals] if single else finals


class Network(nn.Module):
    """A recurrent network, all of whose results enter the prediction."""

    def __init__(
        self, make, *, learned=False, embedded=False, lengths=(3, 3), packed=False
    ):
        super().__init__()
        self.body, self.lengths, self.packed = make(2, 2), lengths, packed
        self.embedding = nn.Embedding(4, 2) if embedded else None
        number = 1 + isinstance(self.body, nn.LSTM)
        self.initial = nn.Parameter(torch.randn(number, 2)) if learned else None
        self.written_out = False

    def forward(self, x):
        net = self.body
        x = x if self.embedding is None else self.embedding(x)
        sequences = [row[:n] for row, n in zip(x, self.lengths, strict=True)]
        states = None
        if self.initial is not None:
            count = net.num_layers * (1 + net.bidirectional)
            states = [s.expand(count, len(x), 2).tanh() for s in self.initial]
        if self.written_out:
            outputs, finals = written_out(net, sequences, states)
        else:
            form = {"packed": self.packed, "single": len(x) == 1}
            outputs, finals = by_torch(net, sequences, states, **form)
        parts = [*outputs, *(2 * f.sin() for f in finals)]
        return torch.cat([part.reshape(1, -1) for part in parts], 1)


BOTH = {"num_layers": 2, "bidirectional": True}
CASES = {
    "LSTM": lambda: Network(nn.LSTM),
    "LSTM, three layers": lambda: Network(partial(nn.LSTM, num_layers=3, bias=False)),
    "LSTM, both directions": lambda: Network(partial(nn.LSTM, **BOTH)),
    "LSTM, batch first": lambda: Network(partial(nn.LSTM, batch_first=True)),
    "LSTM, projected": lambda: Network(partial(nn.LSTM, proj_size=1)),
    "LSTM, one sequence": lambda: Network(nn.LSTM, lengths=(3,)),
    "LSTM, learned states": lambda: Network(nn.LSTM, learned=True),
    "LSTM, embedding": lambda: Network(nn.LSTM, embedded=True),
    "LSTM, packed": lambda: Network(partial(nn.LSTM, **BOTH), lengths=(2, 3), packed=True),
    "LSTM, very uneven": lambda: Network(nn.LSTM, lengths=(1, 1, 1, 1, 3), packed=True),
    "GRU": lambda: Network(nn.GRU, learned=True),
    "GRU, packed": lambda: Network(partial(nn.GRU, **BOTH), lengths=(2, 3), packed=True),
    "GRU, no bias": lambda: Network(partial(nn.GRU, bias=False)),
    "RNN": lambda: Network(partial(nn.RNN, **BOTH), learned=True),
    "RNN, packed": lambda: Network(nn.RNN, lengths=(2, 3), packed=True),
    "ReLU": lambda: Network(partial(nn.RNN, nonlinearity="relu", num_layers=2)),
}


@pytest.fixture(params=list(CASES))
def network(request):
    torch.manual_seed(0)
    return CASES[request.param]().double()


def problem(network):
    x = torch.randn(len(network.lengths), 3, 2, dtype=torch.float64)
    if network.embedding is not None:
        x = torch.tensor([[0, 1, 2], [3, 1, 1]])
    y = torch.randn_like(network(x)).detach()
    return network, nn.MSELoss(reduction="sum"), dict(network.named_parameters()), [(x, y)]


def reference(dense, network, *arguments):
    network.written_out = True
    try:
        return dense(network, *arguments)
    finally:
        network.written_out = False


@pytest.mark.parametrize(
    ("operator", "dense"),
    [(HessianLinearOperator, dense_hessian), (GGNLinearOperator, dense_ggn)],
)
def test_matrix(network, operator, dense):
    arguments = problem(network)
    expected = reference(dense, *arguments)
    A = operator(*arguments)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)
    eye = torch.eye(len(expected), dtype=torch.float64)
    close(torch.stack([A @ e for e in eye], 1), expected)
    close(A @ eye, expected)
    B = operator(*arguments, cache=False)
    close(B @ eye[:, 0], expected[:, 0])
    close(B @ eye[:, :3], expected[:, :3])


def test_jacobian(network):
    model, _, params, data = problem(network)
    x = data[0][0]

    def predict(values):
        return torch.func.functional_call(model, values, (x,)).reshape(-1)

    model.written_out = True
    parts = torch.func.jacrev(predict)({k: p.detach() for k, p in params.items()})
    model.written_out = False
    expected = torch.cat([part.flatten(1) for part in parts.values()], 1)
    J = JacobianLinearOperator(model, params, data)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    V, U = torch.randn(J.shape[1], 3), torch.randn(J.shape[0], 3)
    V, U = V.double(), U.double()
    close(J @ V, expected @ V)
    close(J.T @ U, expected.T @ U)


# ------------------------------------------------------------------- when, and how well


def names_behind(output):
    return [type(node).__name__ for node in nodes_between(edges_of(output))]


def hand_written(model):
    """How many layers and directions are to be recurrences."""
    if getattr(model.body, "proj_size", 0) or len(model.lengths) == 5:
        return 0
    return model.body.num_layers * (1 + model.body.bidirectional)


def test_recurrences_are_used_where_they_are_written(network):
    model, *_, [(x, _)] = problem(network)
    with SecondOrderRules():
        names = names_behind(model(x))
    assert names.count("_TrajectoryBackward") == hand_written(model)


def test_values_are_those_of_torch(network):
    model, *_, [(x, _)] = problem(network)
    with SecondOrderRules():
        value = model(x)
    torch.testing.assert_close(value, model(x), rtol=1e-14, atol=1e-14)


def test_forward_mode(network):
    model, _, params, [(x, _)] = problem(network)

    def function(values):
        values = dict(zip(params, values, strict=True))
        return torch.func.functional_call(model, values, (x,))

    leaves = list(params.values())
    v = [torch.randn_like(p) for p in leaves]
    value, tangent = forward_derivative(function, leaves, v)
    assert names_behind(value).count("_TrajectoryBackward") == hand_written(model)
    u = torch.zeros_like(value).requires_grad_()
    pulled = torch.autograd.grad(model(x), leaves, u, create_graph=True)
    expected = torch.autograd.grad(pulled, u, v)[0]
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_third_derivatives(kind):
    net = kind(2, 2, batch_first=True).double()
    names = [name for name, _ in net.named_parameters()]

    def function(x, *values):
        parameters = dict(zip(names, values, strict=True))
        output, finals = torch.func.functional_call(net, parameters, (x,))
        finals = finals if isinstance(finals, tuple) else (finals,)
        return torch.cat([part.reshape(-1) for part in (output, *finals)])

    values = [p.detach().clone() for p in net.parameters()]
    with SecondOrderRules():
        check(function, [torch.randn(2, 3, 2, dtype=torch.float64), *values])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_some_of_the_parameters(kind):
    torch.manual_seed(0)
    network = Network(partial(kind, num_layers=2)).double()
    model, loss, params, data = problem(network)
    expected = reference(dense_hessian, model, loss, params, data)
    sizes = [p.numel() for p in params.values()]
    for chosen in (["body.weight_hh_l0"], ["body.bias_hh_l0", "body.weight_ih_l1"]):
        for name, p in params.items():
            p.requires_grad_(name in chosen)
        A = HessianLinearOperator(model, loss, {k: params[k] for k in chosen}, data)
        mask = torch.cat(
            [torch.full((n,), k in chosen) for k, n in zip(params, sizes, strict=True)]
        )
        eye = torch.eye(A.shape[0], dtype=torch.float64)
        torch.testing.assert_close(A @ eye, expected[mask][:, mask], rtol=1e-10, atol=1e-11)


def test_steps_after_the_end_of_a_sequence_may_overflow():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.RNN(1, 1, nonlinearity="relu", bias=False)
            nn.init.ones_(self.net.weight_ih_l0)
            nn.init.constant_(self.net.weight_hh_l0, 2.0)

        def forward(self, x):
            # the first one is zero from the second step on
            packed = pack_sequence([x[0], x[1, :1]])
            return self.net(packed)[1][0]

    x = torch.full((2, 1100, 1), -2.0, dtype=torch.float64)
    x[:, 0] = torch.tensor([[1.0], [0.5]])
    model = Doubling().double()
    data = [(x, torch.zeros(2, 1, dtype=torch.float64))]
    H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)
    expected = torch.tensor([[0.25, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(H.to_dense(), expected)


def test_dropout_takes_the_random_numbers_of_torch():
    for packed in (False, True):
        network = Network(partial(nn.LSTM, num_layers=3, dropout=0.5), packed=packed)
        x = torch.randn(2, 3, 2)
        torch.manual_seed(0)
        expected = network(x)
        torch.manual_seed(0)
        with SecondOrderRules():
            torch.testing.assert_close(network(x), expected)
        torch.manual_seed(1)
        assert not torch.allclose(network(x), expected)


def test_single_precision():
    torch.manual_seed(0)
    network = Network(partial(nn.LSTM, **BOTH)).double()
    model, loss, params, [(x, y)] = problem(network)
    v = torch.randn(sum(p.numel() for p in params.values()))
    expected = HessianLinearOperator(model, loss, params, [(x, y)]) @ v.double()
    model.float()
    A = HessianLinearOperator(model, loss, params, [(x.float(), y.float())])
    for product in (A @ v, (A @ torch.stack([v, v], 1))[:, 1]):
        assert (product.double() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
def test_replay_sees_all_steps_as_one_kernel(kind, operator):
    network = Network(partial(kind, **BOTH)).double()
    A = operator(*problem(network))
    v, w = torch.randn(2, A.shape[0], dtype=torch.float64)
    with A._maps.current() as maps:
        (rows,) = maps
        _, recording = record_calls(rows, v)
        names = [call.func.name() for call in recording.calls]
        assert names.count("torchlinop::push") == names.count("torchlinop::pull") == 4
        _, replay = record(rows, v)
        torch.testing.assert_close(replay.run(w), rows(w), rtol=1e-12, atol=1e-13)


def test_kernels_can_be_imported_once_more():
    again = runpy.run_path(recurrences.__file__)
    x = torch.ones(1, 1, 1, 1, 1)
    args = x[0, 0, 0], x, [x[:, :, :, 0], None], 1
    for name in ("pull", "push"):
        assert again[name] is not getattr(recurrences, name)
        torch.testing.assert_close(again[name](*args), getattr(recurrences, name)(*args))
