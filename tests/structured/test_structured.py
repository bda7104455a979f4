"""Structured matrices against their dense forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchlinop import (
    BlockDiagonalLinearOperator,
    ConvergenceWarning,
    DiagonalLinearOperator,
    EighLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    StructuredLinearOperator,
    block,
)
from torchlinop.structured import spectrum_of

from tests.problems import classification

RTOL = {torch.float64: 1e-11, torch.float32: 1e-4}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def positive(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues 1, 2, ..., n."""
    Q, _ = torch.linalg.qr(random(n, n, seed=seed))
    return (Q * torch.arange(1.0, n + 1)) @ Q.T


MATRICES = {
    "identity": lambda d: IdentityLinearOperator([(4,)], "cpu", d),
    "diagonal": lambda d: DiagonalLinearOperator(random(5).exp().to(d)),
    "kronecker": lambda d: KroneckerLinearOperator(
        positive(3).to(d), positive(2, seed=1).to(d)
    ),
    "kronecker with a diagonal": lambda d: KroneckerLinearOperator(
        DiagonalLinearOperator(random(3).exp().to(d)),
        positive(2).to(d),
        IdentityLinearOperator([(2,)], "cpu", d),
    ),
    "one factor": lambda d: KroneckerLinearOperator(positive(3).to(d)),
    "eigh": lambda d: EighLinearOperator(*torch.linalg.eigh(positive(4).to(d))),
    "eigh of a product": lambda d: KroneckerLinearOperator(
        positive(3).to(d), positive(2, seed=1).to(d)
    ).with_eigenvalues(torch.arange(1, 7, dtype=d)),
    "low rank": lambda d: LowRankPlusDiagonalLinearOperator(
        random(5).exp().to(d), random(5, 2, seed=1).to(d), torch.tensor([2.0, 0.5]).to(d)
    ),
    "blocks": lambda d: BlockDiagonalLinearOperator(
        [
            KroneckerLinearOperator(positive(2).to(d), positive(2, seed=1).to(d)),
            DiagonalLinearOperator(random(3).exp().to(d)),
            BlockDiagonalLinearOperator([EighLinearOperator(*torch.linalg.eigh(positive(2).to(d)))]),
        ]
    ),
}  # fmt: skip


@pytest.fixture(params=MATRICES)
def make(request):
    return MATRICES[request.param]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers(make, dtype):
    A = make(dtype)
    dense = A.to_dense().double()
    rtol = RTOL[dtype]
    assert isinstance(A, StructuredLinearOperator)

    def close(value: Tensor, expected: Tensor) -> None:
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol)

    close(A.trace(), dense.trace())
    close(A.det(), torch.linalg.det(dense))
    close(A.logdet(), torch.linalg.slogdet(dense)[1])
    close(A.frobenius_norm(), torch.linalg.norm(dense))
    close(A.diagonal(), dense.diagonal())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse(make, dtype, damping):
    A = make(dtype)
    inverse = A.inverse(damping=damping)
    assert isinstance(inverse, StructuredLinearOperator)
    assert inverse.torch_dtype == dtype
    damped = A.to_dense().double() + damping * torch.eye(A.shape[0]).double()
    expected = torch.linalg.inv(damped)
    rtol = RTOL[dtype]
    torch.testing.assert_close(inverse.to_dense().double(), expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        inverse.logdet().double(), -torch.linalg.slogdet(damped)[1], rtol=rtol, atol=rtol
    )


def _dense_power(A: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("exponent", [0.5, -0.5, -2.0, 1.0])
def test_power(make, exponent):
    A = make(torch.float64)
    if "LowRank" in type(A).__name__:
        A = LowRankPlusDiagonalLinearOperator(torch.full((5,), 0.5), A._U, A._s)
    expected = _dense_power(A.to_dense(), exponent)
    torch.testing.assert_close(A.power(exponent).to_dense(), expected)


@pytest.mark.parametrize("rank", [2, 5, 6])
@pytest.mark.parametrize("exponent", [0.5, -1.5, 2])
def test_power_of_low_rank(rank, exponent):
    A = LowRankPlusDiagonalLinearOperator(torch.full((5,), 0.5).double(), random(5, rank))
    expected = _dense_power(A.to_dense(), exponent)
    torch.testing.assert_close(A.power(exponent).to_dense(), expected)


def test_structure_is_kept(make):
    A = make(torch.float64)
    if isinstance(A, IdentityLinearOperator):
        pytest.skip("a sum of identities is none")
    dense = A.to_dense()
    doubled = 2.0 * A
    assert type(doubled) is type(A)
    torch.testing.assert_close(doubled.to_dense(), 2 * dense)
    assert type(-A / 3) is type(A)
    torch.testing.assert_close((A - doubled).to_dense(), -dense)
    torch.testing.assert_close((A @ doubled).to_dense(), 2 * dense @ dense)
    torch.testing.assert_close((A**3).to_dense(), dense @ dense @ dense)
    if not isinstance(A, KroneckerLinearOperator):  # sums of products are none
        assert type(A + doubled) is type(A)
    if not isinstance(A, LowRankPlusDiagonalLinearOperator):
        assert type(A @ doubled) is type(A)
        assert type(A**2) is type(A)


def test_low_rank_plus_diagonal_is_one():
    A = MATRICES["low rank"](torch.float64)
    total = A + DiagonalLinearOperator(torch.ones(5).double())
    assert isinstance(total, LowRankPlusDiagonalLinearOperator)
    torch.testing.assert_close(total.to_dense(), A.to_dense() + torch.eye(5))


def test_rectangular_and_unsymmetric_products():
    A, B = random(3, 2), random(2, 4, seed=1)
    K = KroneckerLinearOperator(A, B, torch.tensor([2.0, 3.0]))
    dense = torch.kron(torch.kron(A, B), torch.diag(torch.tensor([2.0, 3.0])).double())
    torch.testing.assert_close(K.to_dense(), dense)
    torch.testing.assert_close(K.T.to_dense(), dense.T)
    product = K @ K.T
    assert isinstance(product, KroneckerLinearOperator)
    torch.testing.assert_close(product.to_dense(), dense @ dense.T)
    square = KroneckerLinearOperator(random(3, 3), random(2, 2, seed=1))
    torch.testing.assert_close(
        square.inverse().to_dense(), torch.linalg.inv(square.to_dense())
    )
    torch.testing.assert_close(square.det(), torch.linalg.det(square.to_dense()))
    with pytest.raises(ValueError, match="is not symmetric"):
        square.power(0.5)
    with pytest.raises(ValueError, match="Only square factors have traces"):
        K.trace()


def test_inverse_is_decomposed_once(monkeypatch):
    K = KroneckerLinearOperator(positive(4), positive(3))
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(1) or eigh(A))
    for damping in (0.0, 0.1, 1.0):
        K.inverse(damping=damping).power(0.5).logdet()
    K.power(-0.5).inverse().power(2)
    assert len(calls) == 2


def test_decomposition_is_tried_in_float64(monkeypatch):
    eigh = torch.linalg.eigh

    def fails_in_single(A):
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    matrix = positive(4).float()
    with pytest.warns(ConvergenceWarning, match=r"of a factor .4 x 4.* in torch.float64"):
        spectrum = spectrum_of(matrix, "a factor")
    assert spectrum.precision == torch.float64
    assert spectrum.values.dtype == torch.float32
    torch.testing.assert_close(spectrum.matrix(), matrix)

    def fails(A):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with (
        pytest.warns(ConvergenceWarning, match="failed in torch.float32"),
        pytest.raises(torch.linalg.LinAlgError, match=r"a factor .4 x 4.* torch.float64"),
    ):
        spectrum_of(matrix, "a factor")


@pytest.mark.parametrize("ranks", [(2, 5), (2, 1), (4, 0)])
def test_inverses_of_singular_products_leave_the_kernel_out(ranks):
    factors = []
    for n, rank in zip((4, 5), ranks, strict=True):
        half = random(n, rank, seed=n)
        factors.append(half @ half.T)
    K = KroneckerLinearOperator(*factors)
    dense = torch.kron(*factors)
    eye = torch.eye(20).double()
    inverse = K.inverse(damping=0.3)
    assert inverse._range.vectors.shape[1] == ranks[0] * max(ranks[1], 1)
    expected = torch.linalg.inv(dense + 0.3 * eye)
    for result, matrix in (
        (inverse, expected),
        (inverse.power(0.5) @ inverse.power(0.5), expected),
        (inverse + K.inverse(damping=2), expected + torch.linalg.inv(dense + 2 * eye)),
        (3 * inverse @ inverse, 3 * expected @ expected),
        (inverse + K.with_eigenvalues(torch.arange(20.0)), None),
    ):
        assert type(result) is type(inverse)
        X = random(20, 3)
        Q = result.eigenvectors.to_dense()
        if matrix is None:
            matrix = Q @ result.eigenvalues().diag() @ Q.T
        torch.testing.assert_close(result @ X, matrix @ X)
        torch.testing.assert_close(result @ X[:, 0], matrix @ X[:, 0])


def test_singular_matrices_are_refused():
    singular = torch.diag(torch.tensor([1.0, 0.0, 2.0])).double()
    K = KroneckerLinearOperator(singular, positive(2))
    with pytest.raises(ValueError, match=r"Factor 0 .* its smallest eigenvalue is 0.000e"):
        K.inverse()
    assert K.logdet() == -torch.inf
    assert K.det() == 0
    B = BlockDiagonalLinearOperator([positive(2), K])
    with pytest.raises(TypeError, match="block 0 is a ActionLinearOperator"):
        B.inverse()
    B = BlockDiagonalLinearOperator([K, K])
    with pytest.raises(ValueError, match="In block 0: Factor 0"):
        B.power(-0.5)
    with pytest.raises(ValueError, match="smallest eigenvalue is -1"):
        DiagonalLinearOperator(torch.tensor([1.0, -1.0])).power(0.5)
    with pytest.raises(ValueError, match=r"with damping 0.5 is singular or indefinite"):
        DiagonalLinearOperator(torch.tensor([1.0, -1.0])).inverse(damping=0.5)
    assert DiagonalLinearOperator(torch.tensor([1.0, -1.0])).logdet().isnan()


def test_noise_of_a_semidefinite_factor_is_zero():
    U = random(6, 2)
    K = KroneckerLinearOperator(U @ U.T, positive(2))
    assert int((K.spectra()[0].values == 0).sum()) == 4
    root = K.power(0.5)
    torch.testing.assert_close((root @ root).to_dense(), K.to_dense())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KroneckerLinearOperator(), "at least one factor"),
        (lambda: KroneckerLinearOperator(torch.ones(2, 2, 2)), "has to be a matrix"),
        (lambda: BlockDiagonalLinearOperator([]), "at least one block"),
        (lambda: BlockDiagonalLinearOperator([torch.ones(2, 3)]), "have to be square"),
        (lambda: EighLinearOperator(torch.ones(2), torch.eye(3)), "n x n matrix of eigen"),
        (
            lambda: LowRankPlusDiagonalLinearOperator(torch.ones(2), torch.ones(3, 1)),
            r"a factor \(n, r\)",
        ),
        (
            lambda: LowRankPlusDiagonalLinearOperator(
                torch.tensor([1.0, 2.0]), torch.ones(2, 1)
            ).power(0.5),
            "unless the diagonal is constant",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_blocks_by_name():
    G = GGNLinearOperator(*classification().arguments)
    dense = G.to_dense()
    torch.testing.assert_close(block(G, "0.bias").to_dense(), dense[12:15, 12:15])
    off = block(G, "0.bias", ["2.bias", "0.weight"])
    torch.testing.assert_close(
        off.to_dense(), torch.cat([dense[12:15, 24:], dense[12:15, :12]], dim=1)
    )
    torch.testing.assert_close(
        block(2 * G, "0.bias", space=G.space).to_dense(), 2 * dense[12:15, 12:15]
    )
    with pytest.raises(KeyError, match=r"'bias' is not a parameter; there are 0.weight"):
        block(G, "bias")
    with pytest.raises(TypeError, match="Pass space="):
        block(2 * G, "0.bias")
    with pytest.raises(ValueError, match="A is 3 x 3, but the parameters have 27"):
        block(block(G, "0.bias"), "0.bias", space=G.space)
