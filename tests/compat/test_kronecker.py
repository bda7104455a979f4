"""KFAC under curvlinops' names, against curvlinops itself where it is installed."""

from __future__ import annotations

import pytest
import torch
import torchlinop
from torch import nn
from torchlinop.compat import curvlinops as ours


def _problem(loss):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    data = [(torch.randn(n, 1, 4, 4).double(), torch.randint(3, (n,))) for n in (3, 2)]
    if isinstance(loss, nn.MSELoss):
        data = [(X, torch.randn(len(X), 3).double()) for X, _ in data]
    return model, loss, list(model.parameters()), data


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("curvlinops", reason="curvlinops is not installed")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("separate", [True, False])
def test_same_matrix(peer, loss, fisher_type, approx, separate):
    problem = _problem(loss)
    options = {
        "fisher_type": fisher_type,
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
        "check_deterministic": False,
    }
    K, theirs = (lib.KFACLinearOperator(*problem, **options) for lib in (ours, peer))
    expected = theirs @ torch.eye(K.shape[0]).double()
    torch.testing.assert_close(K.to_dense(), expected)


@pytest.mark.parametrize(
    ("options", "separate"),
    [
        ({"damping": 0.1}, False),
        ({"damping": 0.1}, True),
        ({"damping": (0.1, 0.3)}, False),
        ({"damping": (0.1, 0.3)}, True),
        ({"damping": 0.1, "use_heuristic_damping": True}, False),
        ({"damping": 0.1, "use_exact_damping": True}, False),
        ({"damping": 0.1, "use_exact_damping": True}, True),
    ],
)
def test_same_inverse(peer, options, separate):
    problem = _problem(nn.CrossEntropyLoss())
    dense = []
    for lib in (ours, peer):
        K = lib.KFACLinearOperator(
            *problem,
            fisher_type="type-2",
            separate_weight_and_bias=separate,
            check_deterministic=False,
        )
        inverse = lib.KFACInverseLinearOperator(K, **options)
        dense.append(inverse @ torch.eye(inverse.shape[0]).double())
    torch.testing.assert_close(*dense)


def test_names_and_arguments():
    problem = _problem(nn.CrossEntropyLoss())
    for name in ("KFACLinearOperator", "EKFACLinearOperator"):
        A = getattr(ours, name)(
            *problem,
            False,
            True,
            3,
            ours.FisherType.MC,
            2,
            ours.KFACType.EXPAND,
            1,
            True,
            5,
        )
        B = getattr(torchlinop, name)(
            *problem, fisher_type="mc", seed=3, mc_samples=2, joint_bias=False
        )
        torch.testing.assert_close(A.to_dense(), B.to_dense())
    A = ours.KFOCLinearOperator(*problem, False, True, 1, False, 5)
    B = torchlinop.KFOCLinearOperator(*problem)
    torch.testing.assert_close(A.to_dense(), B.to_dense())
    D = ours.GGNDiagonalLinearOperator(*problem, seed=3, mc_samples=2)
    B = torchlinop.GGNDiagonalLinearOperator(
        *problem, fisher_type="mc", seed=3, mc_samples=2
    )
    assert torch.equal(D.diagonal(), B.diagonal())
    D = ours.GGNDiagonalLinearOperator(*problem)
    assert torch.equal(
        D.diagonal(), torchlinop.GGNDiagonalLinearOperator(*problem).diagonal()
    )
    with pytest.raises(ValueError, match="exclude each other"):
        ours.KFACInverseLinearOperator(
            A, use_heuristic_damping=True, use_exact_damping=True
        )
    with pytest.raises(ValueError, match="has to be a KFAC, EKFAC or KFOC operator"):
        ours.KFACInverseLinearOperator(ours.BlockDiagonalLinearOperator([torch.eye(2)]))
    assert ours.KroneckerProductLinearOperator is torchlinop.KroneckerLinearOperator
    assert ours.EighDecomposedLinearOperator is torchlinop.EighLinearOperator
