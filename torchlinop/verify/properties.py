"""Is the matrix what it is said to be? Tests with random vectors.

All of them compare numbers that are equal for an exact product. By default they may
differ by ``eps**(2/3)`` of their typical size, where ``eps`` is the rounding unit of the
operator's dtype: some hundred times what a product rounds in float32, more in float64.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._convergence import ConvergenceWarning
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.estimate import eigsh
from torchlinop.estimate.arguments import not_empty, positive_count, square_operator
from torchlinop.estimate.probes import ProbeSource
from torchlinop.solve.columns import column_norms
from torchlinop.verify.residuals import wide
from torchlinop.verify.results import Semidefiniteness, Verification, ratio

#: products after which another way of computing them is in use, for sure
_REPEATS = 6


def adjoint(
    A: Any, *, num_probes: int = 3, rtol: float | None = None, seed: int = 0
) -> Verification:
    r"""Whether :math:`\langle A x, y\rangle = \langle x, A^H y\rangle` for random vectors.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    num_probes
        Number of pairs of vectors.
    rtol
        The difference that is accepted, relative to the size that such products have.
    seed
        Of the random vectors.

    Returns
    -------
    Verification

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import LinearOperator
    >>> from torchlinop import verify
    >>> A = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> bool(verify.adjoint(A))
    True
    >>> bool(verify.adjoint(LinearOperator((2, 2), matvec=A.dot, rmatvec=A.dot)))
    False
    """
    A = not_empty(aslinearoperator(A), "adjoint")
    return _dot_test("adjoint", A, A.adjoint(), num_probes, rtol, seed, "not the adjoint")


def symmetric(
    A: Any, *, num_probes: int = 3, rtol: float | None = None, seed: int = 0
) -> Verification:
    r"""Whether :math:`\langle A x, y\rangle = \langle x, A y\rangle` for random vectors.

    Of a complex matrix: whether it is Hermitian. The arguments are those of
    :func:`adjoint`; ``A`` has to be square.

    Examples
    --------
    >>> import numpy as np
    >>> from torchlinop import verify
    >>> bool(verify.symmetric(np.array([[1.0, 2.0], [2.0, 4.0]])))
    True
    >>> bool(verify.symmetric(np.array([[1.0, 2.0], [3.0, 4.0]])))
    False
    """
    A = square_operator(A, "symmetric")
    what = "Hermitian" if A.torch_dtype.is_complex else "symmetric"
    return _dot_test(what, A, A, num_probes, rtol, seed, f"not {what}")


def deterministic(
    A: Any, *, num_products: int = _REPEATS, rtol: float | None = None, seed: int = 0
) -> Verification:
    """Whether products with the same vector are the same, to rounding.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    num_products
        How many are compared with the first one.
    rtol
        The difference that is accepted, relative to the product.
    seed
        Of the vector.

    Returns
    -------
    Verification

    Examples
    --------
    >>> import torch, torchlinop
    >>> from torchlinop import verify
    >>> bool(verify.deterministic(torch.eye(3)))
    True
    """
    A = not_empty(aslinearoperator(A), "deterministic")
    count = positive_count("num_products", num_products)
    x = _normal(A, A.shape[1], 1, seed)
    first = wide(A @ x)
    differences = np.array([column_norms(wide(A @ x) - first)[0] for _ in range(count)])
    scale = np.full(count, column_norms(first)[0])
    return Verification(
        what="deterministic",
        labels=tuple(f"product {k + 2}" for k in range(count)),
        residual_norms=differences,
        relative_residuals=ratio(differences, scale),
        scale=scale,
        rtol=_tolerance(A, rtol),
        complaint="another product",
    )


def positive_semidefinite(
    A: Any, *, num_matvecs: int = 100, rtol: float | None = None, seed: int = 0
) -> Semidefiniteness:
    """Whether there is negative curvature: a Lanczos run towards the lowest eigenvalue.

    What it finds is proven by a vector; that it finds nothing proves nothing, but the
    lowest eigenvalues of a matrix are among the first that Lanczos finds.

    Parameters
    ----------
    A
        A symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    num_matvecs
        Most products.
    rtol
        Curvature down to ``-rtol`` times the largest eigenvalue counts as zero.
    seed
        Of the start vector.

    Returns
    -------
    Semidefiniteness

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import verify
    >>> result = verify.positive_semidefinite(torch.diag(torch.tensor([1.0, -0.5, 2.0])))
    >>> bool(result), round(result.lowest, 3)
    (False, -0.5)
    """
    A = square_operator(A, "positive_semidefinite")
    ends = min(2, A.shape[0])
    limit = max(positive_count("num_matvecs", num_matvecs), ends)
    tolerance = _tolerance(A, rtol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = eigsh(A, ends, which="BE", tol=tolerance, max_matvecs=limit, seed=seed)
    v = wide(pairs.eigenvectors[:, :1])
    v = v / torch.linalg.vector_norm(v)
    image = wide(A @ v.to(A.torch_dtype))
    curvature = torch.vdot(v[:, 0], image[:, 0]).real.item()
    return Semidefiniteness(
        lowest=curvature,
        bound=float(column_norms(image - curvature * v)[0]),
        largest=pairs.eigenvalues.abs().max().item(),
        rtol=tolerance,
        direction=v[:, 0].to(A.torch_dtype),
        num_matvecs=pairs.num_matvecs + 1,
    )


def _dot_test(
    what: str,
    A: TorchLinearOperator,
    B: TorchLinearOperator,
    num_probes: int,
    rtol: float | None,
    seed: int,
    complaint: str,
) -> Verification:
    """Compare ``<A x, y>`` and ``<x, B y>``."""
    count = positive_count("num_probes", num_probes)
    m, n = A.shape
    x, y = _normal(A, n, count, seed), _normal(A, m, count, seed + 1)
    forward, backward = wide(A @ x), wide(B @ y)
    left = (wide(y).conj() * forward).sum(dim=0)
    right = (backward.conj() * wide(x)).sum(dim=0)
    differences = (left - right).abs().cpu().numpy()
    # of independent vectors with normal entries of variance 1
    scale = np.maximum(column_norms(forward), column_norms(backward))
    return Verification(
        what=what,
        labels=tuple(f"probe {k}" for k in range(count)),
        residual_norms=differences,
        relative_residuals=ratio(differences, scale),
        scale=scale,
        rtol=_tolerance(A, rtol),
        complaint=complaint,
    )


def _normal(A: TorchLinearOperator, size: int, count: int, seed: int) -> Tensor:
    return ProbeSource(A, "gaussian", seed, size).rows(count).T


def _tolerance(A: TorchLinearOperator, rtol: float | None) -> float:
    if rtol is None:
        return float(torch.finfo(A.torch_dtype).eps ** (2 / 3))
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol has to be at least 0 and less than 1, got {rtol!r}.")
    return float(rtol)
