"""What a verification says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from torch import Tensor

from torchlinop.estimate import Estimate


class VerificationError(RuntimeError):
    """Something that was verified is not right.

    Attributes
    ----------
    result : Result
        What was found.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(str(result))
        self.result = result

    def __reduce__(self) -> tuple:
        return type(self), (self.result,)


class Result(ABC):
    """The outcome of a verification: true if all is well, and printed as a report."""

    @property
    @abstractmethod
    def ok(self) -> bool:
        """Whether all is well."""

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_bad(self) -> Self:
        """Return the result if all is well.

        Raises
        ------
        VerificationError
            It is not; the message is the report.
        """
        if not self.ok:
            raise VerificationError(self)
        return self


@dataclass(frozen=True, eq=False)
class Verification(Result):
    """True residuals, each with what it is compared with.

    Attributes
    ----------
    what : str
        What was verified.
    labels : tuple of str
        A name for each residual.
    residual_norms : numpy.ndarray
        2-norms, shape ``(K,)``; of a test of a property the sizes of differences.
    relative_residuals : numpy.ndarray
        The same, divided by ``scale``.
    scale : numpy.ndarray
        The sizes that residuals are measured with, shape ``(K,)``.
    rtol : float
        The relative residual that is accepted.
    orthogonality : float
        Largest entry of ``V^H V - I`` (with a second matrix, of ``V^H M V - I``); NaN where
        there are no vectors to be orthogonal.
    complaint : str
        What is said of a residual that is not accepted.
    """

    what: str
    labels: tuple[str, ...]
    residual_norms: np.ndarray
    relative_residuals: np.ndarray
    scale: np.ndarray
    rtol: float
    orthogonality: float = float("nan")
    complaint: str = "not converged"

    @property
    def accepted(self) -> np.ndarray:
        """Which relative residuals are at most ``rtol``, shape ``(K,)``."""
        return self.relative_residuals <= self.rtol

    @property
    def ok(self) -> bool:
        """Whether all are, and vectors that should be orthonormal are."""
        skewed = self.orthogonality > max(self.rtol, 1e-3)
        return bool(self.accepted.all()) and not skewed

    def __str__(self) -> str:
        count = len(self.labels)
        lines = [
            f"{self.what}: {int(self.accepted.sum())} of {count} within a relative "
            f"residual of {self.rtol:.0e}"
        ]
        width = max((len(label) for label in self.labels), default=0)
        for label, norm, relative, good in zip(
            self.labels,
            self.residual_norms,
            self.relative_residuals,
            self.accepted,
            strict=True,
        ):
            mark = "" if good else f"   <- {self.complaint}"
            lines.append(
                f"  {label:>{width}}   residual {norm:.1e}   relative {relative:.1e}{mark}"
            )
        if not np.isnan(self.orthogonality):
            lines.append(f"  orthonormal to {self.orthogonality:.1e}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Semidefiniteness(Result):
    """The lowest curvature that was found.

    Attributes
    ----------
    lowest : float
        ``v^H A v`` for ``direction``: the lowest eigenvalue is at most this.
    bound : float
        There is an eigenvalue within this of ``lowest``.
    largest : float
        The largest size of an eigenvalue that was seen, which ``rtol`` is relative to.
    rtol : float
        What rounding may make of a zero.
    direction : torch.Tensor
        A unit vector ``v``, shape ``(N,)``: the evidence, if ``lowest`` is negative.
    num_matvecs : int
        Vectors that were multiplied.
    """

    lowest: float
    bound: float
    largest: float
    rtol: float
    direction: Tensor = field(repr=False)
    num_matvecs: int

    @property
    def ok(self) -> bool:
        """Whether no curvature below ``-rtol * largest`` was found."""
        return self.lowest >= -self.rtol * self.largest

    def __str__(self) -> str:
        found = (
            "no negative curvature"
            if self.ok
            else "not positive semidefinite: v^H A v < 0 for v = .direction"
        )
        return (
            f"{found};\n  the lowest is {self.lowest:.4g} +- {self.bound:.1e}, the largest "
            f"{self.largest:.4g} ({self.num_matvecs} products)"
        )


@dataclass(frozen=True, eq=False)
class Completeness(Result):
    """Whether there are eigenvalues beyond those that were found.

    Attributes
    ----------
    threshold : float
        Beyond it no other eigenvalue should lie.
    side : str
        What beyond means: ``"above"``, ``"below"`` or ``"above in size"``.
    num_found : int
        Eigenvalues of the list on or beyond the threshold.
    missed : numpy.ndarray
        Ritz values beyond it in the space that is orthogonal to what was found, the most
        extreme one of each random vector that saw any, sorted. There is an eigenvalue at
        least as far out as each.
    num_missed : Estimate
        How many eigenvalues were missed, by quadrature, with the standard error over the
        random vectors.
    num_matvecs : int
        Vectors that were multiplied.
    """

    threshold: float
    side: str
    num_found: int
    missed: np.ndarray
    num_missed: Estimate
    num_matvecs: int

    @property
    def ok(self) -> bool:
        """Whether nothing was seen beyond the threshold."""
        return not len(self.missed)

    def __str__(self) -> str:
        ending = f"({self.num_matvecs} products)"
        found = f"{self.num_found} eigenvalues {self.side} {self.threshold:.6g} were given"
        if self.ok:
            return f"complete: {found}, and no other was seen {ending}"
        ends = self.missed[np.argsort(np.abs(self.missed - self.threshold))]
        value, error = self.num_missed.value, self.num_missed.stderr
        return (
            f"incomplete: {found},\n  about {value:.1f} +- {error:.1f} others are there, "
            f"one as far out as {ends[-1]:.6g} {ending}"
        )


def ratio(residuals: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Quotients; 0 / 0 is 0, NaN is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(residuals == 0, 0.0, residuals / scale)
    return np.where(np.isnan(quotient), np.inf, quotient)
