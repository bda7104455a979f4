"""What is refused, what is left as it was, and what follows a change."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torchlinop import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from torchlinop.reference import dense_ggn

from tests.kronecker.test_zoo import dense_blocks
from tests.kronecker.zoo import ZOO, _labels, _of


class _Odd(nn.Module):
    """Parameters for which there is no rule, or no use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.power = nn.Parameter(torch.tensor(0.5))
        self.twice = nn.Parameter(torch.rand(3))
        self.unused = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        x = self.linear(x).tanh() * self.power.exp()
        return x * self.twice + self.twice


def test_parameters_without_a_rule():
    problem = _of(_Odd(), nn.CrossEntropyLoss(), _labels((3,)))
    match = (
        r"No Kronecker factors for some parameters: 'power' is given to 'exp', .*; "
        r"'twice' is used in several ways \(add, mul\), which make no block; "
        r"'unused.weight' is not used when the model is evaluated. Leave them out"
    )
    for kind in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        with pytest.raises(ValueError, match=match):
            kind(*problem.arguments)
    G = dense_ggn(*problem.arguments)
    D = GGNDiagonalLinearOperator(*problem.arguments)
    torch.testing.assert_close(D.diagonal(), G.diagonal())
    for kind in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        K = kind(*problem.arguments, uncovered="diagonal")
        dense = K.to_dense()
        for names, index, block in dense_blocks(K, G):
            if names != ("linear.weight", "linear.bias"):
                expected = block.diagonal().diag()
                torch.testing.assert_close(dense[index][:, index], expected)


def test_weight_norm_is_named():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    problem = _of(linear, nn.CrossEntropyLoss(), _labels((3,)))
    with pytest.raises(ValueError, match=r"'parametrizations.weight.original0' is"):
        KFACLinearOperator(*problem.arguments)


@pytest.mark.parametrize("rows", [[2, 1], [0, 2], torch.tensor([True, False, True])])
def test_rows_by_their_numbers_are_no_slice(rows):
    """They are a copy, in an order of their own."""
    loss, data = nn.MSELoss(), [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    params = {"W": torch.randn(3, 3).double()}
    predict = lambda p, x: nn.functional.linear(x, p["W"][rows])  # noqa: E731
    with pytest.raises(ValueError, match="'W' is given to '__getitem__'"):
        KFACLinearOperator(predict, loss, params, data)
    D = GGNDiagonalLinearOperator(predict, loss, params, data)
    G = dense_ggn(predict, loss, params, data)
    torch.testing.assert_close(D.diagonal(), G.diagonal())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fisher_type": "type-3"}, "fisher_type has to be one of 'type-2', 'mc', 'empir"),
        ({"weight_sharing": "mean"}, "weight_sharing has to be one of 'expand', 'reduce'"),
        ({"uncovered": "zero"}, "uncovered has to be one of 'error', 'diagonal'"),
        ({"mc_samples": 2}, "mc_samples=2 has no meaning for fisher_type='type-2'"),
        ({"fisher_type": "mc", "mc_samples": 0}, "mc_samples has to be at least 1"),
        ({"fisher_type": "mc", "seed": 0.5}, "mc_samples and seed have to be integers"),
    ],
)
def test_options(options, match):
    with pytest.raises(ValueError, match=match):
        KFACLinearOperator(*ZOO["mlp"]().arguments, **options)


def test_losses():
    general = ZOO["general_loss"]()
    with pytest.raises(TypeError, match="Labels can be drawn for CrossEntropyLoss"):
        KFACLinearOperator(*general.arguments, fisher_type="mc")
    for kind in (EKFACLinearOperator, KFOCLinearOperator, GGNDiagonalLinearOperator):
        with pytest.raises(ValueError, match=f"{kind.__name__} is made of gradients"):
            kind(*general.arguments, fisher_type="forward-only")
    risk = EmpiricalRisk(*general.arguments)
    with pytest.raises(TypeError, match="has its own joint"):
        KFACLinearOperator(risk, joint=True)


def test_factors_that_are_not_finite():
    problem = ZOO["mlp"]()
    problem.data[1][0][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"factors of 0.weight, 0.bias .* after batch 1"):
        KFACLinearOperator(*problem.arguments, check_deterministic=False)
    with pytest.raises(ValueError, match=r"factors of 0.weight .* after batch 1"):
        GGNDiagonalLinearOperator(*problem.arguments, check_deterministic=False)
    predict = lambda p, x: torch.einsum("ni,oi->no", x, p["W"])  # noqa: E731
    arguments = predict, problem.loss, {"W": torch.rand(3, 3).double()}, problem.data
    for kind in (KFACLinearOperator, EKFACLinearOperator, GGNDiagonalLinearOperator):
        options = {} if kind is GGNDiagonalLinearOperator else {"uncovered": "diagonal"}
        with pytest.raises(ValueError, match=r"factors of W are not finite after batch 1"):
            kind(*arguments, **options, check_deterministic=False)


def test_samples_that_do_not_fit():
    problem = ZOO["mlp"]()
    with pytest.raises(ValueError, match=r"3 predictions .* no multiple. Pass batch_size="):
        KFACLinearOperator(*problem.arguments, batch_size=lambda X: 2)


def test_order_of_the_data():
    problem = ZOO["mlp"]()
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    pairs = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(pairs, batch_size=2, shuffle=True)
    K = KFACLinearOperator(*problem.arguments[:3], loader)
    torch.testing.assert_close(
        K.to_dense(), KFACLinearOperator(*problem.arguments).to_dense()
    )
    with pytest.raises(ValueError, match="order"):
        KFACLinearOperator(*problem.arguments[:3], loader, fisher_type="mc")


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_nothing_is_changed(kind):
    problem = ZOO["tokens"]()
    model = problem.model
    before = torch.get_rng_state()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    kind(*problem.arguments, fisher_type="mc")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_follows_changes_and_keeps_the_old_after_an_interrupt(monkeypatch):
    problem = ZOO["mlp"]()
    K = KFACLinearOperator(*problem.arguments)
    old = K.to_dense()
    inverse = K.inverse(damping=1.0)
    fixed = inverse.to_dense()
    with torch.no_grad():
        problem.params[0].mul_(2)
    new = K.to_dense()
    torch.testing.assert_close(new, KFACLinearOperator(*problem.arguments).to_dense())
    assert not torch.allclose(new, old)
    torch.testing.assert_close(inverse.to_dense(), fixed)

    passes = []

    def interrupted(risk, settings):
        passes.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("torchlinop.kronecker.kfac.kfac_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        K.refresh()
    matrix = K._known[1]
    torch.testing.assert_close(matrix.to_dense(), new)
    monkeypatch.undo()
    torch.testing.assert_close(K.to_dense(), new)
    assert passes == [1]


def test_one_pass_over_the_data():
    problem = ZOO["mlp"]()

    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(problem.data)

    data = Counted()
    risk = EmpiricalRisk(*problem.arguments[:3], data, check_deterministic=False)
    before = data.passes
    KFACLinearOperator(risk)
    assert data.passes == before + 1


def test_copies():
    problem = ZOO["mlp"]()
    K = KFACLinearOperator(*problem.arguments, fisher_type="mc", seed=3)
    copy = pickle.loads(pickle.dumps(K))
    torch.testing.assert_close(copy.to_dense(), K.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    problem = ZOO["tokens"]()
    expected = KFACLinearOperator(*problem.arguments).to_dense()
    problem = _of(problem.model, problem.loss, problem.data)
    problem.model.to(dtype)
    K = KFACLinearOperator(*problem.arguments)
    assert K.torch_dtype == torch.float32
    error = (K.to_dense().double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_seeds():
    problem = ZOO["mlp"]()
    one, same, other = (
        KFACLinearOperator(*problem.arguments, fisher_type="mc", seed=seed).to_dense()
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
