"""What matrices with a known structure offer besides their products."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator


class StructuredLinearOperator(TorchLinearOperator):
    """A square matrix of which more is known than its products.

    Not to be made by users. Numbers come as tensors without dimensions, on the
    operator's device and in its dtype; they are added up in float64.
    """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""

    @abstractmethod
    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""

    @abstractmethod
    def power(self, exponent: float) -> TorchLinearOperator:
        """Return a power, for instance -0.5, of a symmetric matrix.

        Raises
        ------
        ValueError
            The power does not exist: a negative one of a singular matrix, a fractional
            one of a matrix with negative eigenvalues.
        """

    @abstractmethod
    def inverse(self, *, damping: float = 0.0) -> TorchLinearOperator:
        r"""Return :math:`(A + \delta I)^{-1}` for a damping :math:`\delta`.

        Raises
        ------
        ValueError
            The damped matrix is singular.
        """

    def _fixed(self) -> StructuredLinearOperator:
        """Return the matrix that takes part in sums and products that keep a structure."""
        return self

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return total(self.diagonal())

    def det(self) -> Tensor:
        """Return the determinant; of a large matrix rather use :meth:`logdet`."""
        sign, logabs = self.slogdet()
        return sign * logabs.exp()

    def logdet(self) -> Tensor:
        """Return the determinant's logarithm: -inf of 0, NaN of a negative one."""
        sign, logabs = self.slogdet()
        return torch.where(sign < 0, torch.nan, logabs)


def total(values: Tensor) -> Tensor:
    """Sum in double precision."""
    wide = torch.complex128 if values.is_complex() else torch.float64
    return values.sum(dtype=wide).to(values.dtype)


def norm_of(values: Tensor) -> Tensor:
    """Euclidean norm in double precision, real."""
    squares = values.abs().double().square().sum()
    return squares.sqrt().to(values.abs().dtype)


def slogdet_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the absolute value of a product."""
    signs = values.sgn().prod()
    return signs, values.abs().double().log().sum().to(values.abs().dtype)


def power_of(
    values: Tensor, exponent: float, what: str, smallest: float | None = None
) -> Tensor:
    """Raise eigenvalues to a power, or say why that is not possible.

    Parameters
    ----------
    values
        Eigenvalues, without those that are zero up to rounding (:func:`without_noise`).
    exponent
        A real number.
    what
        Whose eigenvalues they are, for the error.
    smallest
        The smallest eigenvalue before those that are rounding were replaced.
    """
    if exponent < 0 and bool((values == 0).any()):
        smallest = values.abs().min().item() if smallest is None else smallest
        raise ValueError(
            f"{what} is singular: its smallest eigenvalue is {smallest:.3e}, which is zero "
            f"up to rounding of the largest, {values.abs().max().item():.3e}. Pass a "
            "positive damping: inverse(damping=...), which has powers of its own."
        )
    if exponent % 1 and not values.is_complex() and bool((values < 0).any()):
        raise ValueError(
            f"{what} is not positive semi-definite: its smallest eigenvalue is "
            f"{values.min().item():.3e}, and a real power with exponent {exponent} does "
            "not exist. Pass a damping that is larger: inverse(damping=...).power(...)."
        )
    return values.pow(exponent)


def damped_inverse(values: Tensor, damping: float, what: str) -> Tensor:
    """Return ``1 / (values + damping)``, or say why that is not possible."""
    damped = values + damping
    if bool((damped == 0).any()) or (damping and bool((damped.real <= 0).any())):
        raise ValueError(
            f"{what} with damping {damping:g} is singular or indefinite: its smallest "
            f"eigenvalue is {damped.real.min().item():.3e} (the largest "
            f"{damped.real.max().item():.3e}). Pass a larger damping."
        )
    return 1 / damped


def without_noise(values: Tensor) -> Tensor:
    """Replace eigenvalues that are zero up to rounding by zero."""
    if not values.numel():
        return values
    sizes = values.abs()
    noise = values.numel() * torch.finfo(values.dtype).eps * sizes.max()
    return torch.where(sizes <= noise, 0.0, values)


def same_place(a: TorchLinearOperator, b: TorchLinearOperator) -> bool:
    """Whether two matrices can be combined entry by entry."""
    return b.shape == a.shape and b.device == a.device
