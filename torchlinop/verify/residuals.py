"""True residuals of eigenpairs, singular triplets and solutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array, Scalar
from torchlinop.solve.columns import column_norms, column_sizes, divided
from torchlinop.verify.results import Verification, ratio


def eigenpairs(
    A: Any,
    eigenvalues: Array,
    eigenvectors: Array,
    *,
    M: Any = None,
    rtol: float = 1e-5,
    norm: float | None = None,
) -> Verification:
    r"""Residuals :math:`\|A v - \lambda v\|` of eigenpairs.

    Of a Hermitian matrix there is an eigenvalue within the residual norm of each
    :math:`\lambda` (for :math:`\|v\| = 1`), so the residuals are bounds of the errors. What
    they cannot show is an eigenvalue that was missed.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(N, N)``.
    eigenvalues
        Shape ``(K,)``.
    eigenvectors
        Shape ``(N, K)``; they are normalized here.
    M
        The second matrix of :math:`A v = \lambda M v`.
    rtol
        The residual that is accepted, relative to ``norm`` (times :math:`\|M v\|`).
    norm
        The size of the matrix; by default the largest size of an eigenvalue in the list.
        Give it for eigenvalues that are all small, which can only be right to within
        rounding errors of the matrix.

    Returns
    -------
    Verification
        True if all residuals are accepted and, for real eigenvalues, the vectors are
        orthonormal.

    Raises
    ------
    ValueError
        The shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import verify
    >>> A = torch.diag(torch.tensor([1.0, 2.0]))
    >>> print(verify.eigenpairs(A, torch.tensor([2.0]), torch.tensor([[0.0], [1.0]])))
    eigenpairs: 1 of 1 within a relative residual of 1e-05
      2   residual 0.0e+00   relative 0.0e+00
      orthonormal to 0.0e+00
    """
    A = aslinearoperator(A)
    values = as_tensor(eigenvalues, A.device)
    V = columns("eigenvectors", eigenvectors, A.shape[1], A)
    if values.ndim != 1 or values.shape[0] != V.shape[1]:
        raise ValueError(
            f"Expected one eigenvalue for each of {V.shape[1]} eigenvectors, got shape "
            f"{tuple(values.shape)}."
        )
    V = wide(V)
    values = wide(values)
    V = divided(V, column_sizes(V)[0])
    lengths = torch.linalg.vector_norm(V, dim=0)
    V = V / torch.where(lengths > 0, lengths, 1)
    second = V if M is None else _product(aslinearoperator(M), V)
    residuals = column_norms(_product(A, V) - second * values)
    if norm is None:
        norm = values.abs().max().item() if len(values) else 1.0
    scale = norm * column_norms(second)
    missing = (lengths == 0).cpu().numpy()  # a vector of zeros solves nothing
    relative = np.where(missing, np.inf, ratio(residuals, scale))
    gram = V.mH @ second
    if M is not None:
        d = gram.diagonal().real.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        gram = gram / torch.outer(d, d)
    hermitian = not values.is_complex() or not values.imag.any()
    return Verification(
        what="eigenpairs",
        labels=tuple(_text(v) for v in values),
        residual_norms=residuals,
        relative_residuals=relative,
        scale=scale,
        rtol=rtol,
        orthogonality=_skewness(gram) if hermitian else float("nan"),
    )


def singular_triplets(
    A: Any, U: Array, s: Array, Vh: Array, *, rtol: float = 1e-5
) -> Verification:
    r"""Residuals of singular triplets: the larger of :math:`\|A v - \sigma u\|` and
    :math:`\|A^H u - \sigma v\|`.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    U, s, Vh
        As ``svds`` returns them: shapes ``(M, K)``, ``(K,)`` and ``(K, N)``.
    rtol
        The residual that is accepted, relative to the largest singular value in the list.

    Returns
    -------
    Verification

    Examples
    --------
    >>> import torch
    >>> from torchlinop import verify
    >>> A = torch.tensor([[3.0, 4.0]])
    >>> bool(verify.singular_triplets(A, *torch.linalg.svd(A, full_matrices=False)))
    True
    """
    A = aslinearoperator(A)
    left = wide(columns("U", U, A.shape[0], A))
    right = as_tensor(Vh, A.device)
    if right.ndim != 2:
        raise ValueError(f"Vh has to have shape (K, N), got {tuple(right.shape)}.")
    right = wide(right.mH)
    right = columns("Vh^H", right, A.shape[1], A)
    values = wide(as_tensor(s, A.device))
    if not left.shape[1] == right.shape[1] == len(values):
        raise ValueError(
            f"Expected as many columns of U as rows of Vh and singular values, got "
            f"{left.shape[1]}, {right.shape[1]} and {len(values)}."
        )
    forward = column_norms(_product(A, right) - left * values)
    backward = column_norms(_product(A.H, left) - right * values)
    residuals = np.maximum(forward, backward)
    scale = np.full(len(values), values.abs().max().item() if len(values) else 1.0)
    skewness = max(_skewness(left.mH @ left), _skewness(right.mH @ right))
    return Verification(
        what="singular triplets",
        labels=tuple(_text(v) for v in values),
        residual_norms=residuals,
        relative_residuals=ratio(residuals, scale),
        scale=scale,
        rtol=rtol,
        orthogonality=skewness,
    )


def solution(
    A: Any, x: Array, b: Array, *, damping: Scalar = 0.0, rtol: float = 1e-5
) -> Verification:
    r"""Residuals :math:`\|b - (A + \delta I) x\|` of solutions.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    x
        Shape ``(N,)`` or ``(N, K)``.
    b
        Shape ``(M,)`` or ``(M, K)``.
    damping
        :math:`\delta`.
    rtol
        The residual that is accepted, relative to :math:`\|b\|`.

    Returns
    -------
    Verification

    Examples
    --------
    >>> import torch
    >>> from torchlinop import verify
    >>> print(verify.solution(torch.eye(2), torch.ones(2), torch.tensor([1.0, 1.5])))
    solution: 0 of 1 within a relative residual of 1e-05
      column 0   residual 5.0e-01   relative 2.8e-01   <- not converged
    """
    A = aslinearoperator(A)
    X = wide(columns("x", x, A.shape[1], A))
    B = wide(columns("b", b, A.shape[0], A))
    if X.shape[1] != B.shape[1]:
        raise ValueError(f"x has {X.shape[1]} columns, b {B.shape[1]}.")
    image = _product(A, X)
    if damping and A.shape[0] != A.shape[1]:
        raise ValueError(
            f"damping needs a square matrix, got {A.shape[0]} x {A.shape[1]}. For damped "
            "least squares verify A.H @ A with damping=damp**2 and b replaced by A.H @ b."
        )
    if damping:
        image = image + damping * X
    residuals, scale = column_norms(B - image), column_norms(B)
    return Verification(
        what="solution",
        labels=tuple(f"column {k}" for k in range(B.shape[1])),
        residual_norms=residuals,
        relative_residuals=ratio(residuals, scale),
        scale=scale,
        rtol=rtol,
    )


def columns(name: str, array: Array, size: int, A: TorchLinearOperator) -> Tensor:
    """Return vectors as a tensor ``(size, K)``."""
    tensor = as_tensor(array, A.device)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(1)
    if tensor.ndim != 2 or tensor.shape[0] != size:
        raise ValueError(
            f"{name} has to have {size} rows for a {A.shape[0]} x {A.shape[1]} operator, "
            f"got shape {tuple(tensor.shape)}."
        )
    return tensor


def wide(x: Tensor) -> Tensor:
    """In double precision: differences are to be exact, products are as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _product(A: TorchLinearOperator, X: Tensor) -> Tensor:
    return wide(A @ X)


def _skewness(gram: Tensor) -> float:
    if not len(gram):
        return 0.0
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (gram - identity).abs().max().item()


def _text(value: Tensor) -> str:
    number = value.item()
    if isinstance(number, complex) and number.imag == 0:
        number = number.real
    return f"{number:.6g}"
