"""Gradients of single samples and their moments, against one sample at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchlinop import (
    EFLinearOperator,
    EmpiricalRisk,
    GradientCovarianceLinearOperator,
    GradientSecondMomentLinearOperator,
    block,
    gradient_and_loss,
    per_sample_gradients,
)
from torchlinop.reference import dense_gradient

from tests.gradients.reference import dense_gradients, dense_moment
from tests.kronecker.zoo import ZOO
from tests.problems import classification, mlp, regression

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
D = torch.float64
BOTH = [GradientSecondMomentLinearOperator, GradientCovarianceLinearOperator]


def _centred(kind):
    return kind is GradientCovarianceLinearOperator


def _blocks(space, groups, dense):
    """The dense matrix with zeros outside of the blocks."""
    starts = [0, *itertools.accumulate(space.sizes)]
    out = torch.zeros_like(dense)
    for names in groups:
        index = torch.cat(
            [
                torch.arange(starts[i], starts[i + 1])
                for i, name in enumerate(space.names)
                if name in names
            ]
        )
        out[index.unsqueeze(1), index] = dense[index][:, index]
    return out


@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_use_a_parameter(name):
    torch.manual_seed(0)
    made = ZOO[name]()
    with sdpa_kernel(SDPBackend.MATH):
        rows = dense_gradients(*made.arguments)
    found = per_sample_gradients(*made.arguments)
    torch.testing.assert_close(found, rows)
    gradient = dense_gradient(*made.arguments)
    torch.testing.assert_close(found.sum(0), gradient)
    for kind in BOTH:
        A = kind(*made.arguments)
        dense = dense_moment(rows, centred=_centred(kind))
        torch.testing.assert_close(A.to_dense(), _blocks(A.space, A.blocks, dense))


def test_groups_are_layers():
    problem = classification()
    M = GradientSecondMomentLinearOperator(*problem.arguments)
    assert list(M.blocks) == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    groups = {"biases": ["2.bias", "0.bias"], "rest": ["0.weight", "2.weight"]}
    M = GradientSecondMomentLinearOperator(*problem.arguments, groups=groups)
    dense = dense_moment(dense_gradients(*problem.arguments), centred=False)
    torch.testing.assert_close(M.to_dense(), _blocks(M.space, groups.values(), dense))
    weight = block(M, "0.weight")
    torch.testing.assert_close(weight.to_dense(), dense[:12, :12])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("cuts", [[40], [3, 9, 1, 20, 7]])
def test_more_samples_than_parameters(kind, cuts):
    """Blocks of 8 and 3 parameters become matrices in the first or the third batch."""
    torch.manual_seed(0)
    model = mlp(3, 2, 1)
    X, y = torch.randn(40, 3, dtype=D), 5 + torch.randn(40, 1, dtype=D)
    data = [*zip(X.split(cuts), y.split(cuts), strict=True)]
    arguments = model, nn.MSELoss(), list(model.parameters()), data
    A = kind(*arguments)
    dense = dense_moment(dense_gradients(*arguments), centred=_centred(kind))
    expected = _blocks(A.space, A.blocks, dense)
    torch.testing.assert_close(A.to_dense(), expected)
    torch.testing.assert_close(A.trace(), expected.trace())
    torch.testing.assert_close(A.frobenius_norm(), expected.norm())
    torch.testing.assert_close(A.logdet(), torch.logdet(expected), rtol=1e-7, atol=0)
    inverse = torch.linalg.inv(expected + 0.1 * torch.eye(11, dtype=D))
    torch.testing.assert_close(A.inverse(damping=0.1).to_dense(), inverse)


@pytest.mark.parametrize("kind", BOTH)
def test_fewer_samples_than_parameters(kind):
    problem = regression()
    A = kind(*problem.arguments)
    expected = A.to_dense()
    identity = torch.eye(len(expected), dtype=D)
    inverse = torch.linalg.inv(expected + 0.1 * identity)
    torch.testing.assert_close(A.inverse(damping=0.1).to_dense(), inverse)
    root = A.inverse(damping=0.1).power(0.5).to_dense()
    torch.testing.assert_close(root @ root, inverse)
    torch.testing.assert_close(A.diagonal(), expected.diagonal())
    assert A.logdet() == -torch.inf  # the rank is at most 8
    values = eigsh(A, k=3, return_eigenvectors=False)
    assert values[-1] == pytest.approx(torch.linalg.eigvalsh(expected)[-1].item())


def test_one_term_a_sample_is_the_empirical_fisher_matrix():
    problem = classification()
    M = GradientSecondMomentLinearOperator(*problem.arguments)
    E = EFLinearOperator(*problem.arguments).to_dense()
    torch.testing.assert_close(M.to_dense(), _blocks(M.space, M.blocks, E))


def test_noise_of_minibatches():
    """Means of gradients that are drawn with replacement have the covariance C / B."""
    problem = classification()
    C = GradientCovarianceLinearOperator(*problem.arguments)
    g = 9 * per_sample_gradients(*problem.arguments)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(9, (20_000, 4), generator=generator)
    means = g[drawn].mean(1)
    variance = means.var(0).sum()
    torch.testing.assert_close(variance, C.trace() / 4, rtol=0.02, atol=0)


def test_float32():
    problem = classification(dtype=torch.float32)
    C = GradientCovarianceLinearOperator(*problem.arguments)
    twin = classification()
    for p, q in zip(twin.params, problem.params, strict=True):
        p.data.copy_(q.data)
    data = [(X.double(), y) for X, y in problem.data]
    rows = dense_gradients(twin.model, twin.loss, twin.params, data)
    dense = _blocks(C.space, C.blocks, dense_moment(rows, centred=True))
    assert C.to_dense().dtype == torch.float32
    torch.testing.assert_close(C.to_dense().double(), dense, rtol=1e-4, atol=1e-5)


def test_follows_the_model():
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    C, x = GradientCovarianceLinearOperator(risk), torch.ones(27, dtype=D)
    before = C @ x
    with torch.no_grad():
        problem.params[0].add_(0.1)
    expected = dense_moment(dense_gradients(*problem.arguments), centred=True)
    after = _blocks(C.space, C.blocks, expected) @ x
    assert not torch.allclose(before, after)
    torch.testing.assert_close(C @ x, after)
    total = gradient_and_loss(*problem.arguments)[0]
    rows = per_sample_gradients(risk)
    torch.testing.assert_close(rows.sum(0), torch.cat([g.reshape(-1) for g in total]))


@pytest.mark.parametrize("kind", BOTH)
def test_in_a_file(kind, tmp_path):
    pytest.importorskip("safetensors")
    problem = regression()
    groups = {"first": ["0.weight", "0.bias", "2.weight"], "last": ["2.bias"]}
    A = kind(*problem.arguments, groups=groups)
    A.save(tmp_path / "moment")
    loaded = kind.load(tmp_path / "moment", params=dict(problem.model.named_parameters()))
    torch.testing.assert_close(loaded.to_dense(), A.to_dense())


def test_refused():
    problem = classification()
    kind = GradientSecondMomentLinearOperator
    with pytest.raises(ValueError, match=r"in none are \['2.weight'\], in several \[\]"):
        kind(*problem.arguments, groups={"a": ["0.weight", "0.bias", "2.bias"]})
    with pytest.raises(KeyError, match="are no parameters"):
        kind(*problem.arguments, groups={"a": ["weight"]})
    with pytest.raises(ValueError, match=r"Write \['0.weight'\]"):
        kind(*problem.arguments, groups={"a": "0.weight"})
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, y), batch_size=3, shuffle=True
    )
    with pytest.raises(ValueError, match="shuffle"):
        per_sample_gradients(*problem.arguments[:3], shuffled)
    X[0] = torch.inf
    with pytest.raises(ValueError, match=r"Gradients in 0.weight, 0.bias are not finite"):
        kind(*problem.arguments[:3], [(X, y)], check_finite=False)
