"""Arguments of curvlinops' release and of its main branch."""

from __future__ import annotations

import itertools
from collections import UserDict

import pytest
import scipy.sparse.linalg
import torch
import torchlinop
from torch import nn
from torch.func import functional_call, grad, hessian
from torchlinop.compat import curvlinops as ours
from torchlinop.compat.curvlinops.examples import (
    OuterProductLinearOperator,
    TensorLinearOperator,
    functorch,
    gradient_and_loss,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def _problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)).double()
    model.eval()
    data = [(torch.rand(n, 3).double(), torch.randint(3, (n,))) for n in (3, 2)]
    return model, nn.CrossEntropyLoss(), data


def _risk(model, loss, data, names):
    """The loss on all data as a function of one vector, by torch.func alone."""
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    own = dict(model.named_parameters())

    def risk(t):
        parts = t.split([own[n].numel() for n in names])
        given = {n: p.view_as(own[n]) for n, p in zip(names, parts, strict=True)}
        return loss(functional_call(model, given, (X,)), y)

    return risk


def _flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


def test_at_tensors_that_are_not_the_models():
    model, loss, data = _problem()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    own = dict(model.named_parameters())
    names = ["0.weight", "1.bias", "2.bias"]
    params = {n: torch.randn_like(own[n]).detach() for n in names}
    params["1.bias"] = own["1.bias"]  # one of them is
    H = ours.HessianLinearOperator(model, loss, params, data)
    risk = _risk(model, loss, data, names)
    reference = hessian(risk)(_flat(params))
    torch.testing.assert_close(H.to_dense(), reference, **CLOSE)
    at_own = hessian(risk)(_flat({n: own[n] for n in names}))
    assert (reference - at_own).norm() > 0.01 * reference.norm()
    expected = functorch.functorch_hessian(model, loss, params, data)
    torch.testing.assert_close(expected, reference, **CLOSE)
    blocks = ours.HessianLinearOperator(model, loss, params, data, block_sizes=[2, 1])
    expected = torch.block_diag(reference[:8, :8], reference[8:, 8:])
    torch.testing.assert_close(blocks.to_dense(), expected, **CLOSE)
    g, value = gradient_and_loss(model, loss, params, data)
    torch.testing.assert_close(
        torch.cat([p.reshape(-1) for p in g]), grad(risk)(_flat(params))
    )
    torch.testing.assert_close(value, risk(_flat(params)))
    torch.testing.assert_close(H.gradient_and_loss(), (g, value))

    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(own[n] is p for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())

    params["0.weight"].mul_(2)  # changes of all tensors are noticed
    model[1].running_mean.add_(0.3)
    with torch.no_grad():
        model[2].weight.add_(0.1)
    risk = _risk(model, loss, data, names)
    torch.testing.assert_close(H.to_dense(), hessian(risk)(_flat(params)), **CLOSE)


def test_every_operator_is_at_the_tensors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    data = [(torch.rand(4, 3).double(), torch.randint(3, (4,)))]
    params = {n: torch.randn_like(p).detach() for n, p in model.named_parameters()}
    there = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    there.load_state_dict(params)
    loss = nn.CrossEntropyLoss()
    for name in ("GGN", "EF", "FisherMC", "KFAC", "EKFAC", "KFOC", "GGNDiagonal"):
        A, B = (
            getattr(ours, f"{name}LinearOperator")(m, loss, p, data)
            for m, p in ((model, params), (there, list(there.parameters())))
        )
        torch.testing.assert_close(A.to_dense(), B.to_dense(), msg=name, **CLOSE)
    J = ours.JacobianLinearOperator(model, params, data)
    expected = functorch.functorch_jacobian(there, list(there.parameters()), data)
    torch.testing.assert_close(J.to_dense(), expected, **CLOSE)
    for name in ("ggn", "empirical_fisher", "gradient_and_loss"):
        dense = getattr(functorch, f"functorch_{name}")
        own = list(there.parameters())
        found, expected = dense(model, loss, params, data), dense(there, loss, own, data)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_tensors_that_have_no_place():
    model, loss, data = _problem()
    own = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"params\['0.bias'\] has shape \(3,\), but"):
        ours.GGNLinearOperator(model, loss, {"0.bias": torch.ones(3).double()}, data)
    with pytest.raises(KeyError, match="'bias' is not a parameter"):
        ours.GGNLinearOperator(model, loss, {"bias": torch.ones(2).double()}, data)
    copies = [p.detach().clone() for p in own.values()]
    with pytest.raises(ValueError, match="is not a parameter of Sequential"):
        ours.GGNLinearOperator(model, loss, copies, data)
    model[2].tied = model[2].bias
    twice = {"2.bias": own["2.bias"], "2.tied": torch.ones(3).double()}
    with pytest.raises(ValueError, match="two values for one parameter"):
        ours.GGNLinearOperator(model, loss, twice, data)


def test_tied_tensors_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            self.b = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model, W = Tied(), torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    X, y = torch.rand(4, 2).double(), torch.rand(4, 2).double()
    H = ours.HessianLinearOperator(model, nn.MSELoss(), {"b.weight": W}, [(X, y)])
    expected = hessian(lambda w: nn.functional.mse_loss(X @ w.T @ w.T, y))(W)
    torch.testing.assert_close(H.to_dense(), expected.reshape(4, 4), **CLOSE)


def test_functions_of_named_parameters():
    """Main's models may be functions (params, X)."""
    model, loss, data = _problem()
    params = {n: torch.randn_like(p).detach() for n, p in model.named_parameters()}

    def function(given, X):
        return functional_call(model, given, (X,))

    for name in ("Hessian", "GGN", "EF", "FisherMC"):
        A, B = (
            getattr(ours, f"{name}LinearOperator")(m, loss, params, data)
            for m in (model, function)
        )
        torch.testing.assert_close(A.to_dense(), B.to_dense(), **CLOSE)


def test_samples_and_blocks():
    model, loss, data = _problem()
    params = list(model.parameters())
    arguments = model, loss, params, data
    F = ours.GGNLinearOperator(*arguments, mc_samples=3, seed=5, num_data=5)
    assert isinstance(F, ours.FisherMCLinearOperator)
    expected = torchlinop.FisherMCLinearOperator(*arguments, mc_samples=3, seed=5)
    torch.testing.assert_close(F.to_dense(), expected.to_dense(), **CLOSE)
    for seed in (None, 2147483647):  # the default
        options = {} if seed is None else {"seed": seed}
        F = ours.GGNLinearOperator(*arguments, mc_samples=1, **options)
        expected = torchlinop.FisherMCLinearOperator(*arguments, seed=2147483647)
        torch.testing.assert_close(F.to_dense(), expected.to_dense(), **CLOSE)
    F = ours.GGNLinearOperator(*arguments, False, True, 5, mc_samples=1)
    torch.testing.assert_close(F.to_dense(), expected.to_dense(), **CLOSE)
    exact = ours.GGNLinearOperator(*arguments, False, True, 5, mc_samples=0)
    assert isinstance(exact, ours.GGNLinearOperator)
    dense = functorch.functorch_ggn(*arguments)
    torch.testing.assert_close(exact.to_dense(), dense, **CLOSE)
    D = ours.GGNDiagonalLinearOperator(*arguments)
    torch.testing.assert_close(D.diagonal(), dense.diagonal(), **CLOSE)
    torch.testing.assert_close(
        D.inverse(0.5).diagonal(), 1 / (dense.diagonal() + 0.5), **CLOSE
    )

    dense = functorch.functorch_hessian(*arguments)
    H = ours.HessianLinearOperator(*arguments, block_sizes=[1] * len(params))
    starts = [0]
    for p in params:
        starts.append(starts[-1] + p.numel())
    diagonal = [dense[a:b, a:b] for a, b in itertools.pairwise(starts)]
    torch.testing.assert_close(H.to_dense(), torch.block_diag(*diagonal), **CLOSE)
    H = ours.HessianLinearOperator(*arguments, block_sizes=None)
    torch.testing.assert_close(H.to_dense(), dense, **CLOSE)
    for sizes in ([1, 2], [0, len(params)]):
        with pytest.raises(ValueError, match="positive numbers with the sum 6"):
            ours.HessianLinearOperator(*arguments, block_sizes=sizes)
    for name in ("GGN", "EF"):
        operator = getattr(ours, f"{name}LinearOperator")
        assert operator(*arguments, block_sizes=None).shape == dense.shape
        with pytest.raises(ValueError, match="Only the Hessian has block_sizes"):
            operator(*arguments, block_sizes=[6])


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, X):
        return self.layer(X["x"]).square()


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_inputs_in_dicts(kind):
    torch.manual_seed(0)
    model = OfDict()
    plain = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 2)]
    data = [(kind({"x": X}), y) for X, y in plain]
    options = {"batch_size_fn": lambda X: X["x"].shape[0], "num_data": 5}
    params = dict(model.named_parameters())
    loss = nn.MSELoss()
    f = nn.Sequential(model.layer)
    f.forward = lambda X: model.layer(X).square()
    own = list(f.parameters())
    for name in ("hessian", "ggn", "empirical_fisher"):
        dense = getattr(functorch, f"functorch_{name}")
        found = dense(model, loss, params, data, input_key="x")
        torch.testing.assert_close(found, dense(f, loss, own, plain), **CLOSE)
    G = ours.GGNLinearOperator(model, loss, params, data, **options)
    expected = functorch.functorch_ggn(model, loss, params, data, input_key="x")
    torch.testing.assert_close(G.to_dense(), expected, **CLOSE)
    J = functorch.functorch_jacobian(model, params, data, input_key="x")
    found = ours.JacobianLinearOperator(model, params, data, **options)
    torch.testing.assert_close(found.to_dense(), J, **CLOSE)
    found = gradient_and_loss(model, loss, params, data, **options)
    expected = functorch.functorch_gradient_and_loss(
        model, loss, params, data, input_key="x"
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    options["num_data"] = 6
    with pytest.raises(ValueError, match="num_data=6, but the data holds 5"):
        gradient_and_loss(model, loss, params, data, **options)


def test_preconditioners_are_functions_or_operators():
    A = torch.diag(torch.linspace(1, 4, 20)).double()
    inverse = torch.diag(1 / A.diagonal())
    A, b = torchlinop.aslinearoperator(A), torch.ones(20, 2).double()
    for P in (
        lambda X: inverse @ X,
        torchlinop.aslinearoperator(inverse),
        scipy.sparse.linalg.aslinearoperator(inverse.numpy()),
        inverse,
    ):
        C = ours.CGInverseLinearOperator(A, tolerance=1e-10, preconditioner=P)
        torch.testing.assert_close(C @ b, inverse @ b, **CLOSE)
        assert max(C.last_solve.iterations) <= 2  # 20 eigenvalues without
        N = ours.NeumannInverseLinearOperator(A, num_terms=1, preconditioner=P)
        torch.testing.assert_close(N @ b, inverse @ b, **CLOSE)


def test_another_submatrix():
    A = torch.arange(20.0).reshape(4, 5)
    S = ours.SubmatrixLinearOperator(TensorLinearOperator(A), [0, 3], [1])
    torch.testing.assert_close(S.to_dense(), A[[0, 3]][:, [1]])
    S.set_submatrix(row_idxs=[2], col_idxs=[4, 0])
    assert S.shape == (1, 2)
    torch.testing.assert_close(S.to_dense(), A[[2]][:, [4, 0]])
    torch.testing.assert_close(S.T.to_dense(), A[[2]][:, [4, 0]].T)


def test_matrices_of_the_examples():
    torch.manual_seed(0)
    A = torch.randn(4, 3).double()
    T = TensorLinearOperator(A)
    torch.testing.assert_close(T.to_dense(), A)
    torch.testing.assert_close(T.adjoint().to_dense(), A.T)
    S = A @ A.T + torch.eye(4)
    T = TensorLinearOperator(S)
    assert T.adjoint() is T
    torch.testing.assert_close(T.trace(), S.trace())
    torch.testing.assert_close(T.det(), torch.linalg.det(S))
    torch.testing.assert_close(T.logdet(), torch.logdet(S))
    torch.testing.assert_close(T.frobenius_norm(), S.norm())
    with pytest.raises(ValueError, match=r"has to be a matrix, got shape \(4,\)"):
        TensorLinearOperator(S[0])
    c = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    P = OuterProductLinearOperator(c, A)
    torch.testing.assert_close(P.to_dense(), A @ c.diag() @ A.T)
    torch.testing.assert_close((T - P).to_dense(), S - A @ c.diag() @ A.T)


def test_inverse_kfac_is_damped_as_there():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
    arguments = model, nn.MSELoss(), dict(model.named_parameters()), data
    K = ours.KFACLinearOperator(*arguments, fisher_type="type-2", backend="make_fx")
    ((block,),) = [K.blocks.values()]
    B, A = (f for f in block.factors)
    eye = torch.eye
    plain = torch.kron(B + 0.1 * eye(2), A + 0.1 * eye(3))
    torch.testing.assert_close(K.inverse(0.1).to_dense(), torch.linalg.inv(plain))
    exact = torch.kron(B, A) + 0.1 * eye(6)
    found = K.inverse(damping=0.1, use_exact_damping=True, retry_double_precision=True)
    torch.testing.assert_close(found.to_dense(), torch.linalg.inv(exact))
    E = ours.EKFACLinearOperator(*arguments, fisher_type="type-2")
    exact = E.to_dense() + 0.1 * eye(6)
    torch.testing.assert_close(E.inverse(damping=0.1).to_dense(), torch.linalg.inv(exact))
