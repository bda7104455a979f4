"""Where KFAC is exact, what KFOC minimizes, and to what Monte Carlo converges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchlinop import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from torchlinop.reference import dense_ggn

from tests.kronecker.test_zoo import dense_blocks
from tests.kronecker.zoo import ZOO, Model, _of

D = torch.float64


def deep_linear(*, pool: bool, shape: tuple = (3,)) -> Model:
    layers = [nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)]
    if pool:
        layers.append(_MeanOfPositions())
    model = nn.Sequential(*layers)
    out = (2,) if pool else (*shape[:-1], 2)
    data = [
        (torch.randn(n, *shape, dtype=D), torch.randn(n, *out, dtype=D)) for n in (3, 1, 2)
    ]
    return _of(model, nn.MSELoss(), data)


class _MeanOfPositions(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def is_exact(problem: Model, **options) -> None:
    K = KFACLinearOperator(*problem.arguments, **options)
    G, dense = dense_ggn(*problem.arguments), K.to_dense()
    expected = torch.zeros_like(G)
    for _, index, block in dense_blocks(K, G):
        expected[index.unsqueeze(1), index] = block
    torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize("joint_bias", [True, False])
def test_deep_linear_network(joint_bias):
    is_exact(deep_linear(pool=False), joint_bias=joint_bias)


def test_expand_for_a_loss_of_each_position():
    is_exact(deep_linear(pool=False, shape=(4, 3)), weight_sharing="expand")


def test_reduce_for_a_mean_of_positions():
    is_exact(deep_linear(pool=True, shape=(4, 3)), weight_sharing="reduce")


def test_reduce_for_convolutions_of_whole_images():
    """A linear convolutional network with global average pooling, one datum at a time."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    data = [(torch.randn(n, 2, 4, 4, dtype=D), torch.randn(n, 2, dtype=D)) for n in (2, 3)]
    is_exact(_of(model, nn.MSELoss(reduction="sum"), data), weight_sharing="reduce")


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]), label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 3.0, 0.0]), reduction="sum"),
    ],
)
def test_one_datum_that_counts(loss):
    """Ignored targets and weights of zero leave one datum, for which KFAC is exact."""
    X, y = torch.randn(3, 3, dtype=D), torch.tensor([-100, 1, -100])
    if loss.reduction == "sum":
        y = torch.tensor([0, 1, 2])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    is_exact(_of(model, loss, [(X[:2], y[:2]), (X[2:], y[2:])]))


@pytest.mark.parametrize(
    "name", ["mlp", "weighted", "convolutions", "tokens_second", "tied_head"]
)
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_batches_do_not_matter(name, fisher_type, sharing):
    problem = ZOO[name]()
    X = torch.cat([X for X, _ in problem.data])
    y = torch.cat([y for _, y in problem.data])
    each = len(y) // len(X)
    options = {"fisher_type": fisher_type, "weight_sharing": sharing}
    whole = KFACLinearOperator(*problem.arguments[:3], [(X, y)], **options).to_dense()
    cuts = [0, 1, 3, len(X)]
    pieces = [(X[a:b], y[a * each : b * each]) for a, b in itertools.pairwise(cuts)]
    if name == "tokens_second" and fisher_type != "mc":
        pieces = pieces[::-1]
    pieces = KFACLinearOperator(*problem.arguments[:3], pieces, **options)
    torch.testing.assert_close(pieces.to_dense(), whole)


@pytest.mark.parametrize("name", ["mlp", "weighted", "binary", "convolutions"])
def test_monte_carlo_converges(name):
    problem = ZOO[name]()
    exact = KFACLinearOperator(*problem.arguments).to_dense()
    errors = []
    for mc_samples in (50, 5000):
        K = KFACLinearOperator(*problem.arguments, fisher_type="mc", mc_samples=mc_samples)
        errors.append(((K.to_dense() - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name", ["mlp", "weighted", "tokens"])
def test_empirical_and_sampled_diagonals(name):
    problem = ZOO[name]()
    empirical = GGNDiagonalLinearOperator(*problem.arguments, fisher_type="empirical")
    E = EFLinearOperator(*problem.arguments)
    torch.testing.assert_close(empirical.diagonal(), E.to_dense().diagonal())
    if name == "tokens":  # labels of a sample's terms are pulled back together
        return
    options = {"mc_samples": 3, "seed": 5}
    sampled = GGNDiagonalLinearOperator(*problem.arguments, fisher_type="mc", **options)
    F = FisherMCLinearOperator(*problem.arguments, **options)
    torch.testing.assert_close(sampled.diagonal(), F.to_dense().diagonal())


class _Linear(nn.Module):
    """A linear model of indices whose head is its embedding, or a copy of it."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=D)
        self.token, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.token.weight = nn.Parameter(weight)
        self.head.weight = self.token.weight if tied else nn.Parameter(weight.clone())

    def forward(self, tokens):
        return self.head(self.token(tokens))


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
def test_tied_weight_has_the_partial_traces_of_its_uses(fisher_type):
    data = [(torch.tensor([0, 3, 3, 1]), torch.randn(4, 5, dtype=D))]
    tied, untied = (_of(_Linear(tied=is_tied), nn.MSELoss(), data) for is_tied in (1, 0))
    options = {"fisher_type": fisher_type}
    K = KFACLinearOperator(*tied.arguments, **options)
    assert len(K.blocks) == 1
    if fisher_type == "type-2":  # of which KFAC is exact
        uses = dense_ggn(*untied.arguments)
    else:
        uses = KFACLinearOperator(*untied.arguments, **options).to_dense()
    expected = (uses[:20, :20] + uses[20:, 20:]).reshape(5, 4, 5, 4)
    block = K.to_dense().reshape(5, 4, 5, 4)
    for trace in ("icjc->ij", "icid->cd"):
        torch.testing.assert_close(
            torch.einsum(trace, block), torch.einsum(trace, expected)
        )


def _dense_ggn(problem: Model) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return dense_ggn(*problem.arguments)


def _nearest(block: torch.Tensor, rows: int) -> float:
    """Distance to the nearest Kronecker product, by singular values."""
    n = len(block) // rows
    rearranged = block.reshape(rows, n, rows, n).transpose(1, 2).reshape(rows**2, n**2)
    return float(torch.linalg.svdvals(rearranged)[1:].norm())


@pytest.mark.parametrize(
    "name", ["mlp", "weighted", "function", "tokens_second", "tied_head"]
)
def test_kfoc_is_the_nearest_product(name):
    problem = ZOO[name]()
    K = KFACLinearOperator(*problem.arguments)
    O = KFOCLinearOperator(*problem.arguments, rtol=1e-14, max_passes=400)  # noqa: E741
    few = KFOCLinearOperator(*problem.arguments, max_passes=1)
    assert few.num_passes == 2
    G = _dense_ggn(problem)
    if name == "tokens_second":  # torch's forward mode forgets padding_idx
        G[:, 4:8] = 0
    torch.testing.assert_close(G, G.T)
    for names, index, block in dense_blocks(O, G):
        if len(O.blocks[names].factors) < 2:
            continue
        pair = index.unsqueeze(1), index
        distances = [float((A.to_dense()[pair] - block).norm()) for A in (O, few, K)]
        best = _nearest(block, O.blocks[names].factors[0].shape[0])
        scale = 1e-12 * float(block.norm())
        np.testing.assert_allclose(distances[0], best, rtol=1e-5, atol=scale)
        assert distances[0] <= distances[1] + scale
        assert distances[1] <= distances[2] + scale


def test_kfoc_of_groups():
    problem = ZOO["convolutions"]()
    K, O = (A(*problem.arguments) for A in (KFACLinearOperator, KFOCLinearOperator))  # noqa: E741
    G = dense_ggn(*problem.arguments)
    for _, index, block in dense_blocks(O, G):
        pair = index.unsqueeze(1), index
        mask = K.to_dense()[pair] != 0  # the groups
        near, far = ((A.to_dense()[pair] - block * mask).norm() for A in (O, K))
        assert near < 0.99 * far


def test_ekfac_is_exact_in_its_own_basis():
    problem = ZOO["mlp"]()
    E = EKFACLinearOperator(*problem.arguments)
    G = dense_ggn(*problem.arguments)
    for names, _, block in dense_blocks(E, G):
        Q = E.blocks[names].eigenvectors.to_dense()
        torch.testing.assert_close(
            E.blocks[names].eigenvalues(), (Q.T @ block @ Q).diagonal()
        )


def test_forward_only_has_an_identity():
    problem = ZOO["mlp"]()
    K = KFACLinearOperator(*problem.arguments, fisher_type="forward-only")
    X = torch.cat([X for X, _ in problem.data])
    a = torch.cat([X, torch.ones(len(X), 1)], dim=1)
    expected = torch.kron(torch.eye(4, dtype=D), a.T @ a / len(X))
    torch.testing.assert_close(K.blocks["0.weight", "0.bias"].to_dense(), expected)
