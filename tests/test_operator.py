"""Operators mixed with SciPy's, with sparse matrices, arrays and scalars."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torchlinop import (
    DiagonalLinearOperator,
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    SubmatrixLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
)
from torchlinop.reference import dense_hessian

from tests.problems import classification


@pytest.fixture
def pair():
    problem = classification()
    return HessianLinearOperator(*problem.arguments), dense_hessian(
        *problem.arguments
    ).numpy()


def _same(operator, dense):
    np.testing.assert_allclose(operator @ np.eye(dense.shape[1]), dense, atol=1e-12)
    torch_product = operator @ torch.eye(dense.shape[1], dtype=torch.float64)
    np.testing.assert_allclose(torch_product, dense, atol=1e-12)


@pytest.fixture(
    params=["csr", "csr_matrix", "dia_matrix", "coo", "scipy operator", "array", "tensor"]
)
def other(request, rng):
    matrix = rng.standard_normal((27, 27))
    return {
        "csr": scipy.sparse.csr_array,
        "csr_matrix": scipy.sparse.csr_matrix,
        "coo": scipy.sparse.coo_array,
        "dia_matrix": scipy.sparse.dia_matrix,
        "scipy operator": scipy.sparse.linalg.aslinearoperator,
        "array": np.array,
        "tensor": torch.from_numpy,
    }[request.param](matrix), matrix


def test_sum_with_other_kinds(pair, other):
    A, dense = pair
    B, matrix = other
    _same(A + B, dense + matrix)
    _same(A - B, dense - matrix)
    if isinstance(B, scipy.sparse.linalg.LinearOperator):
        # SciPy's own composite, for NumPy vectors
        np.testing.assert_allclose((B + A) @ np.ones(27), (matrix + dense).sum(1))
        return
    _same(B + A, matrix + dense)
    _same(B - A, matrix - dense)


def test_product_with_other_kinds(pair, other):
    A, dense = pair
    B, matrix = other
    if isinstance(B, (np.ndarray, torch.Tensor)):  # arrays are multiplied at once
        assert type(A @ B) is type(B) is type(B @ A)
        np.testing.assert_allclose(A @ B, dense @ matrix, atol=1e-12)
        np.testing.assert_allclose(B @ A, matrix @ dense, atol=1e-12)
        return
    _same(A @ B, dense @ matrix)
    _same((A @ B).T, (dense @ matrix).T)
    if isinstance(B, scipy.sparse.linalg.LinearOperator):
        np.testing.assert_allclose((B @ A) @ np.ones(27), matrix @ dense.sum(1))
        _same(aslinearoperator(B) @ A, matrix @ dense)
        return
    _same(B @ A, matrix @ dense)


@pytest.mark.parametrize("scalar", [2, 2.5, np.float32(0.5), np.array(3.0), 1 - 2j])
def test_scalars_on_both_sides(pair, scalar):
    A, dense = pair
    x = np.arange(27.0)
    for scaled in (scalar * A, A * scalar, A / (1 / scalar)):
        np.testing.assert_allclose(scaled @ x, scalar * dense @ x)
    scaled = torch.tensor(2.0) * A
    np.testing.assert_allclose(scaled @ x, 2 * dense @ x)
    assert (2 * (3 * A)).args == (A, 6.0)


def test_torch_functions_reach_the_operator(pair):
    A, dense = pair
    X = torch.randn(2, 27, dtype=torch.float64)
    for product in (torch.matmul(X, A), X @ A, torch.mm(X, A), torch.matmul(A, X.T).T):
        assert isinstance(product, torch.Tensor)
        np.testing.assert_allclose(product, X.numpy() @ dense, atol=1e-12)
    np.testing.assert_allclose(torch.mv(A, X[0]), dense @ X[0].numpy(), atol=1e-12)
    with pytest.raises(TypeError):
        torch.linalg.eigh(A)


def test_numpy_functions_do_not_swallow_the_operator(pair):
    A, _ = pair
    with pytest.raises(TypeError):
        np.add(np.ones(27), A)


def test_self_adjoint_stays_itself(pair):
    A, _ = pair
    identity = IdentityLinearOperator([(27,)], "cpu", torch.float64)
    for S in (A, A + 2 * identity, 3 * A, A**2, A - identity):
        assert S.H is S
        assert S.T is S
    assert ((1j * A).H).args == (A, -1j)


def test_complex_operators(rng):
    matrix = rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4))
    A = aslinearoperator(matrix)
    D = DiagonalLinearOperator(
        torch.tensor([1.0, 2j, 3.0, 4.0 - 1j], dtype=torch.complex128)
    )
    diagonal = np.diag([1.0, 2j, 3.0, 4.0 - 1j])
    composite = (A @ D + 2j * A) ** 2
    dense = np.linalg.matrix_power(matrix @ diagonal + 2j * matrix, 2)
    x = rng.standard_normal(4) + 1j * rng.standard_normal(4)
    np.testing.assert_allclose(composite @ x, dense @ x)
    np.testing.assert_allclose(composite.H @ x, dense.conj().T @ x)
    np.testing.assert_allclose(composite.T @ x, dense.T @ x)
    np.testing.assert_allclose(x @ composite, x @ dense)
    np.testing.assert_allclose(composite.T.H @ x, dense.conj() @ x)


def test_result_of_float32_operator_with_float64_one():
    A = aslinearoperator(torch.eye(3))
    B = aslinearoperator(torch.eye(3, dtype=torch.float64))
    assert (A + B).dtype == (A @ B).dtype == np.float64
    assert ((A @ B) @ np.ones(3, dtype=np.float32)).dtype == np.float64
    assert ((A @ B) @ np.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "matrix",
    [
        np.arange(6).reshape(2, 3),
        [[1, 2], [3, 4]],
        torch.arange(4).reshape(2, 2),
        np.float16([[1, 2]]),
        np.asfortranarray(np.eye(3)[::-1]),
        torch.eye(3, dtype=torch.bfloat16),
        np.matrix([[1.0, 2.0]]),
    ],
)
def test_aslinearoperator_of_matrices(matrix):
    A = aslinearoperator(matrix)
    dense = matrix.float().numpy() if isinstance(matrix, torch.Tensor) else matrix
    np.testing.assert_array_equal(A @ np.eye(A.shape[1]), dense)
    assert aslinearoperator(A) is A


class Foreign:
    """What counts as an operator: a shape and a product with vectors ``(N,)``."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def matvec(self, x):
        assert x.ndim == 1
        return self.matrix @ x


class ForeignWithAdjoint(Foreign):
    def rmatvec(self, x):
        assert x.ndim == 1
        return self.matrix.conj().T @ x


class ForeignWithBlocks(ForeignWithAdjoint):
    """As pylops has it: no operator of SciPy, and arithmetic with its own kind only."""

    def matvec(self, x):
        return super().matvec(x.reshape(-1))

    def matmat(self, X):
        return self.matrix @ X

    def rmatmat(self, X):
        return self.matrix.conj().T @ X

    def __add__(self, other):
        return NotImplemented

    __sub__ = __matmul__ = __add__


FOREIGN = pytest.mark.parametrize("kind", [ForeignWithAdjoint, ForeignWithBlocks])


@FOREIGN
def test_foreign_objects_in_expressions(pair, kind, rng):
    A, dense = pair
    matrix = rng.standard_normal((27, 27))
    B = kind(matrix)
    for mixed, expected in (
        (aslinearoperator(B), matrix),
        (A + B, dense + matrix),
        (B + A, matrix + dense),
        (A - B, dense - matrix),
        (B - A, matrix - dense),
        (A @ B, dense @ matrix),
        (A * B, dense @ matrix),
        (B @ A, matrix @ dense),
        (2 * A @ B - A, 2 * dense @ matrix - dense),
    ):
        assert isinstance(mixed, TorchLinearOperator)
        _same(mixed, expected)
        _same(mixed.T, expected.T)
        np.testing.assert_allclose(mixed @ np.ones(27), expected.sum(1), atol=1e-12)


@FOREIGN
def test_foreign_objects_that_are_complex_or_without_a_dtype(kind, rng):
    matrix = rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4))
    A = aslinearoperator(kind(matrix))
    _same(pickle.loads(pickle.dumps(A)).H, matrix.conj().T)
    B = kind(matrix.real)
    del B.dtype
    assert aslinearoperator(B).dtype == np.float64
    assert (aslinearoperator(B) @ np.ones((4, 0))).shape == (3, 0)


def test_foreign_objects_without_an_adjoint(pair, rng):
    A, dense = pair
    matrix = rng.standard_normal((27, 27))
    B = A + Foreign(matrix)
    np.testing.assert_allclose(B @ np.eye(27), dense + matrix, atol=1e-12)
    for x in (np.ones(27), np.ones((27, 2))):
        with pytest.raises(NotImplementedError, match="have a method rmatvec"):
            B.T @ x


def test_scipy_operators_of_functions_of_plain_vectors():
    """Which would make a matrix of a column (N, 1)."""
    diagonal = np.arange(1.0, 4.0)
    scaling = scipy.sparse.linalg.LinearOperator(
        (3, 3), lambda x: diagonal * x, dtype=float
    )
    A = aslinearoperator(scaling)
    np.testing.assert_array_equal(A @ np.ones(3), diagonal)
    np.testing.assert_array_equal(A @ np.ones((3, 1)), diagonal[:, None])
    assert (A @ np.ones((3, 0))).shape == (3, 0)


def test_names_of_composites(pair):
    A, _ = pair
    kinds = [A + A, A @ A, 2 * A, A**2, (1j * A @ A).T, aslinearoperator(np.eye(3))]
    names = [repr(B).split()[1] for B in kinds]
    assert names == ["Sum", "Product", "Multiple", "Power", "Conjugate", "Dense"]


def test_copies_and_pickles(pair):
    A, dense = pair
    A @ np.ones(27)
    for clone in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A), copy.copy(A)):
        np.testing.assert_allclose(clone @ np.eye(27), dense, atol=1e-12)
        np.testing.assert_allclose((clone + clone).T @ np.ones(27), 2 * dense.sum(0))


def test_threads(pair):
    A, dense = pair
    results = [None] * 4

    def work(i):
        x = np.eye(27)[i]
        results[i] = [A @ x for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, products in enumerate(results):
        for y in products:
            np.testing.assert_allclose(y, dense[:, i], atol=1e-12)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.set_grad_enabled(True),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default device", "grad"],
)
def test_products_in_any_context(context):
    problem = classification()
    dense = dense_hessian(*problem.arguments)
    x = torch.randn(27, dtype=torch.float64)
    H = HessianLinearOperator(*problem.arguments)
    with context():
        for _ in range(6):
            y = H @ x
            matrix = H.to_dense()
    torch.testing.assert_close(y.clone(), dense @ x)
    torch.testing.assert_close(matrix.clone(), dense)
    with context():
        later = HessianLinearOperator(*problem.arguments) @ x
    torch.testing.assert_close(later.clone(), dense @ x)


def test_another_default_device(pair, other, arrays, rng):
    """Nothing is made on the default device, neither before nor in a product."""
    A, dense = pair
    B, matrix = other
    X, x = rng.standard_normal((27, 2)), rng.standard_normal(27)
    given = arrays.make(X), arrays.make(x)
    with torch.device("meta"):
        C = 2 * (aslinearoperator(B) @ A + B).T ** 2 - A / 3 + (1j * A).T.H
        products = [C @ g for g in given]
        lists = A @ x.tolist(), C.to_dense()
        vector = A.space.to_vector(A.space.to_named(torch.from_numpy(x)))
    expected = 2 * np.linalg.matrix_power((matrix @ dense + matrix).T, 2) - dense / 3
    expected = expected - 1j * dense
    for g, product in zip((X, x), products, strict=True):
        np.testing.assert_allclose(arrays.read(product), expected @ g, rtol=1e-9)
    np.testing.assert_allclose(lists[0], dense @ x)
    np.testing.assert_allclose(lists[1], expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(vector, x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callable_losses_without_gradient_mode(context):
    """The loss is differentiated although the caller has switched gradients off."""
    problem = classification()
    data = [(X, torch.randn(len(X), 3).double()) for X, _ in problem.data]
    arguments = problem.model, torch.nn.SmoothL1Loss(), problem.params, data
    x = torch.ones(27, dtype=torch.float64)
    for operator in (GGNLinearOperator, EFLinearOperator):
        expected = operator(*arguments) @ x
        assert expected.norm() > 0
        with context():
            y = operator(*arguments) @ x
        torch.testing.assert_close(y.clone(), expected)


def test_autocast_leaves_no_trace():
    model = torch.nn.Linear(6, 5)
    data = [(torch.randn(9, 6), torch.randn(9, 5))]
    H = HessianLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    x = torch.randn(35)
    before = H @ x
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            torch.testing.assert_close(H @ x, before)
    torch.testing.assert_close(H @ x, before)


def test_tensors_made_in_inference_mode(pair):
    A, dense = pair
    with torch.inference_mode():
        x = torch.ones(27, dtype=torch.float64)
    for _ in range(6):
        np.testing.assert_allclose(A @ x, dense.sum(1))


def test_awkward_tensors(pair):
    A, dense = pair
    x = torch.randn(27, dtype=torch.float64, requires_grad=True)
    y = A @ x
    assert not y.requires_grad
    np.testing.assert_allclose(y, dense @ x.detach().numpy(), atol=1e-12)
    z = torch.randn(27, dtype=torch.complex128)
    np.testing.assert_allclose(A @ z.conj(), dense @ z.numpy().conj(), atol=1e-12)
    np.testing.assert_allclose(A @ z.conj().imag, dense @ -z.numpy().imag, atol=1e-12)
    np.testing.assert_allclose(A @ z[::1].real, dense @ z.numpy().real, atol=1e-12)


def test_submatrices_of_any_indices():
    matrix = np.arange(12.0).reshape(3, 4)
    for rows, columns in (
        ([2, 0], [1, -1]),
        (range(0, 3, 2), slice(1, None, 2)),
        (np.array([1]), torch.tensor([3, 0])),
        ([], [0]),
    ):
        A = SubmatrixLinearOperator(matrix, rows, columns)
        expected = matrix[list(range(3)[rows] if isinstance(rows, slice) else rows)]
        np.testing.assert_array_equal(A.to_dense(), expected.reshape(-1, 4)[:, columns])


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([True, False, True], "mask.nonzero"),
        (list(np.array([True, False, True])), "mask.nonzero"),
        (torch.tensor([True, False, True]), "mask.nonzero"),
        ([0.5], "list of integers"),
        ([[0, 1]], "list of integers"),
        ({0, 1}, "list of integers"),
        (1, "list of integers"),
        ([0, -3], "index twice"),
    ],
    ids=str,
)
def test_bad_indices(indices, match):
    with pytest.raises(ValueError, match=match):
        SubmatrixLinearOperator(np.eye(3), indices, [0])


def test_indices_out_of_range():
    with pytest.raises(IndexError, match="columns holds 3, but the matrix has 3 columns"):
        SubmatrixLinearOperator(np.eye(3), [0], [3])
