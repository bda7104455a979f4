"""Vectors and their products with a matrix: what follows from them without another product.

Rayleigh-Ritz and least squares in the span of vectors that somebody else has chosen. Small
matrices are float64 on the host; what is reported of a vector is computed from the vector.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from torchlinop._checkpoint import State
from torchlinop.solve.basis import inner
from torchlinop.solve.columns import column_norms

Which: TypeAlias = Literal["LA", "SA", "LM"]

#: most points of a curve of Ritz values
_POINTS = 60
#: entries times squared vectors up to which they are merged: half a second of one core
_MERGED = 1.6e9
#: bytes of vectors that may wait for being merged
_WAITING = 1 << 26
#: most vectors after the first merging: a second one of so many would cost what it did
_LATER = 128
#: a projection that differs by more than this part from its adjoint is not Hermitian
_SKEW = 1e-2


class Ritz(NamedTuple):
    """The projection of a Hermitian matrix to the span of vectors, in nested order."""

    #: (m, r), combinations of the vectors that are orthonormal; the first j span what the
    #: vectors up to ``leading[j - 1]`` span
    combinations: np.ndarray
    #: (r,)
    leading: np.ndarray
    #: (r, r), the matrix in this basis
    projection: np.ndarray
    #: (r, r), the Gram matrix of what the products have outside of the span
    outside: np.ndarray

    def values(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, combinations and residual norms of the first ``size`` vectors."""
        T = self.projection
        values, S = np.linalg.eigh(T[:size, :size])
        below = np.linalg.norm(T[size:, :size] @ S, axis=0) ** 2
        square = np.einsum("ik,ij,jk->k", S.conj(), self.outside[:size, :size], S).real
        return values, S, np.sqrt(below + np.maximum(square, 0))


class Pairs:
    """Pairs ``(x, A x)``, at most so many; older ones are merged, or forgotten.

    Merging waits until somebody wants to see the pairs, or until more bytes wait than may.

    Parameters
    ----------
    size
        Length ``N`` of the vectors.
    limit
        Most vectors that are kept, at least 16.
    b
        A right-hand side ``(M, 1)``: the best solution in the span is then kept as well.
    """

    def __init__(self, size: int, limit: int, b: Tensor | None = None) -> None:
        self._size = size
        self._limit = limit
        self._b = b
        # numbers of products, and blocks in which each product is below its vector; an
        # interrupt finds a block with its number, or neither
        self._blocks: list[tuple[int, Tensor]] = []
        self._count = 0
        self._waiting: list[tuple[int, Tensor]] = []
        self._room = _WAITING
        self._past: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._past_solutions: list[tuple[int, float]] = []

    @property
    def past(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """What merging has found: number, Ritz values, residual norms."""
        self._settle()
        return self._past

    @property
    def past_solutions(self) -> list[tuple[int, float]]:
        """Norms of the best residuals that merging has found, with their numbers."""
        self._settle()
        return self._past_solutions

    @property
    def numbers(self) -> list[int]:
        """For each vector, the number of the product that it came with."""
        self._settle()
        return self._numbers()

    def _numbers(self) -> list[int]:
        return [n for n, block in self._blocks for _ in range(block.shape[1])]

    def state(self) -> State:
        """All of it, for :meth:`go_on`."""
        self._settle()
        return {
            "blocks": [block for _, block in self._blocks],
            "numbers": [number for number, _ in self._blocks],
            "past": self._past,
            "past_solutions": self._past_solutions,
            "limit": self._limit,
        }

    def go_on(self, state: State, device: torch.device) -> None:
        """Take over the pairs of another process."""
        blocks = [block.to(device) for block in state["blocks"]]
        self._blocks = list(zip(state["numbers"], blocks, strict=True))
        self._count = sum(block.shape[1] for block in blocks)
        self._past = [tuple(point) for point in state["past"]]
        self._past_solutions = [tuple(point) for point in state["past_solutions"]]
        self._limit = min(self._limit, max(state["limit"], self._count))

    def append(self, x: Tensor, y: Tensor, number: int) -> None:
        """Keep copies of a block ``(N, K)`` and its product ``(M, K)``."""
        if x.shape[1] > self._limit // 2:  # more than can be kept
            x, y = x[:, : self._limit // 2], y[:, : self._limit // 2]
        block = torch.cat((x, y))
        self._waiting.append((number, block))
        self._room -= block.nbytes
        if self._room < 0 or self._forgets(len(block)):
            self._settle()

    def _forgets(self, size: int) -> bool:
        """Whether older vectors are forgotten, which takes no time, and not merged."""
        return self._b is None and too_long(size, self._limit)

    def _settle(self) -> None:
        """Merge what waits: once it is asked for, since it takes longer than products."""
        while self._waiting:
            number, block = self._waiting[0]
            width = min(block.shape[1], self._limit // 2)
            if self._count + width > self._limit:
                if self._forgets(len(block)):
                    self._forget()
                else:
                    self._merge()
                width = min(width, self._limit // 2)  # the limit may be lower now
            self._blocks.append((number, block[:, :width]))
            self._count += width
            del self._waiting[0]  # an interrupt before this makes it come twice, no harm
        self._room = _WAITING

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return all vectors and products, ``(N, m)`` and ``(M, m)``; none of zeros."""
        self._settle()
        return self._matrices()

    def _matrices(self) -> tuple[Tensor, Tensor]:
        both = torch.cat([block for _, block in self._blocks], dim=1)
        X, Y = both[: self._size], both[self._size :]
        norms = column_norms(X)
        norms = np.where(np.isfinite(norms) & (norms > 0), norms, 1)
        scale = torch.as_tensor(1 / norms, dtype=X.real.dtype, device=X.device)
        return X * scale, Y * scale

    def ritz(self, X: Tensor, Y: Tensor) -> Ritz:
        """Project to the span of the vectors.

        Raises
        ------
        ValueError
            The matrix is not square, not Hermitian there, or products are not finite.
        """
        if X.shape[0] != Y.shape[0]:
            raise ValueError(
                f"A {Y.shape[0]} x {X.shape[0]} operator has no eigenvalues. Use "
                "solution(b), or watch A.H @ A."
            )
        gram, mixed = inner(X, X), inner(X, Y)
        if not (np.isfinite(gram).all() and np.isfinite(mixed).all()):
            raise ValueError("Products that were seen have NaN or infinite entries.")
        C, leading = independent(gram, _least(X.dtype))
        T = C.conj().T @ mixed @ C
        skew = np.linalg.norm(T - T.conj().T)
        if skew > _SKEW * np.linalg.norm(T):
            raise ValueError(
                "Ritz pairs need a Hermitian matrix; on the vectors that were seen this "
                f"one differs by {skew / np.linalg.norm(T):.0%} from its adjoint."
            )
        combine = torch.as_tensor(C, device=X.device)
        rest = torch.as_tensor(C @ T, device=X.device)
        outside = np.zeros_like(T)
        for x, y in zip(X.split(1 << 16), Y.split(1 << 16), strict=True):
            defect = y.to(combine.dtype) @ combine - x.to(combine.dtype) @ rest
            outside += (defect.mH @ defect).cpu().numpy()
        return Ritz(C, leading, (T + T.conj().T) / 2, outside)

    def _forget(self) -> None:
        """Drop the older half."""
        room = self._limit // 2
        while self._count > room:
            self._count -= self._blocks.pop(0)[1].shape[1]

    def _merge(self) -> None:
        """Replace the pairs by half as many: what solves best, and Ritz vectors."""
        X, Y = self._matrices()
        numbers = self._numbers()
        last, kept = numbers[-1], np.zeros((len(numbers), 0))
        if self._b is not None:
            found = least_squares(Y, self._b, numbers)
            self._past_solutions.extend(found.curve)
            kept = np.column_stack([found.combination, found.directions])
        self._limit = min(self._limit, _LATER)
        room = self._limit // 2 - kept.shape[1]
        try:
            ritz = self.ritz(X, Y)
        except ValueError:  # not Hermitian: the last vectors
            others = np.eye(len(numbers))[:, -room:]
        else:
            values, S, residuals = ritz.values(len(ritz.leading))
            low = min(room // 2, len(values))
            ends = np.r_[:low, max(low, len(values) - (room - low)) : len(values)]
            others = ritz.combinations @ S[:, ends]
            self._past.append((last, values[ends], residuals[ends]))
        kept = np.column_stack([kept, others])
        dtype = X.dtype.to_complex() if np.iscomplexobj(kept) else X.dtype
        combine = torch.as_tensor(kept, dtype=dtype, device=X.device)
        X, Y = X.to(dtype), Y.to(dtype)
        self._blocks = [(last, torch.cat((X @ combine, Y @ combine)))]
        self._count = kept.shape[1]


class LeastSquares(NamedTuple):
    """What minimizes ``|b - Y c|``."""

    #: (m, 1)
    combination: np.ndarray
    #: (m, d), of which the images are the last two that were new, made orthonormal: all
    #: that MINRES needs to go on from the solution as if nothing had been forgotten
    directions: np.ndarray
    #: number of the product, norm that was reached with it
    curve: list[tuple[int, float]]


def too_long(size: int, count: int) -> bool:
    """Whether merging so many vectors, of so many entries each, takes seconds."""
    return size * count**2 > _MERGED


def independent(gram: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormalize vectors with the Gram matrix ``gram`` in their order.

    Left out are vectors whose new part is less than ``least`` of what it is the difference
    of: rounding errors are multiplied by at most ``1 / least``.

    Returns
    -------
    numpy.ndarray, numpy.ndarray
        Combinations ``(m, r)`` and which vectors were new, ``(r,)``.
    """
    size = len(gram)
    C = np.zeros((size, size), dtype=gram.dtype)
    leading: list[int] = []
    lengths = np.sqrt(np.maximum(gram.diagonal().real, 0))
    for j in range(size):
        if not lengths[j] > 0:
            continue
        known = C[:, : len(leading)]
        new = np.zeros(size, dtype=gram.dtype)
        new[j] = 1 / lengths[j]
        for _ in range(2):  # a second pass removes what the first has rounded
            new = new - known @ (known.conj().T @ (gram @ new))
        square = (new.conj() @ (gram @ new)).real
        if square > (least * np.linalg.norm(new * lengths)) ** 2:
            C[:, len(leading)] = new / np.sqrt(square)
            leading.append(j)
    return C[:, : len(leading)], np.array(leading, dtype=int)


def least_squares(Y: Tensor, b: Tensor, numbers: list[int]) -> LeastSquares:
    """Minimize ``|b - Y c|`` for ``Y`` of shape ``(M, m)``, ``b`` of shape ``(M, 1)``."""
    wide = torch.promote_types(torch.promote_types(Y.dtype, b.dtype), torch.float64)
    _, leading = independent(inner(Y, Y), 1e-7)
    Q, R = torch.linalg.qr(Y[:, torch.as_tensor(leading, device=Y.device)].to(wide))
    rest = b.to(wide)
    coordinates = torch.zeros_like(Q[:1].mH)
    for _ in range(2):  # a second time for what rounding has left
        more = Q.mH @ rest
        coordinates, rest = coordinates + more, rest - Q @ more
    last = torch.eye(len(leading), dtype=wide, device=Y.device)[:, -2:]
    wanted = torch.cat([coordinates, last], dim=1)
    solved = torch.linalg.solve_triangular(R, wanted, upper=True).cpu().numpy()
    c = np.zeros((len(numbers), solved.shape[1]), dtype=solved.dtype)
    c[leading] = solved
    squares = np.abs(coordinates.cpu().numpy()[:, 0]) ** 2
    to_come = np.append(np.cumsum(squares[::-1])[::-1], 0)[1:]
    norms = np.sqrt(float(column_norms(rest)[0]) ** 2 + to_come)
    curve = [(numbers[j], float(r)) for j, r in zip(leading, norms, strict=True)]
    return LeastSquares(c[:, :1], c[:, 1:], curve)


def chosen(values: np.ndarray, k: int, which: Which) -> np.ndarray:
    """Return the places of ``k`` of the ascending values, in ascending order."""
    check_choice(k, which)
    keys = {"LA": values, "SA": -values, "LM": np.abs(values)}
    return np.sort(np.argsort(keys[which], kind="stable")[-k:])


def check_choice(k: int, which: str) -> None:
    """Refuse what is no number of values, or no end of a spectrum."""
    if which not in get_args(Which):
        raise ValueError(f"which has to be 'LA', 'SA' or 'LM', got {which!r}.")
    if not k >= 1:
        raise ValueError(f"k has to be at least 1, got {k!r}.")


def ritz_curve(
    pairs: Pairs, k: int, which: Which
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual norms and Ritz values after how many products.

    Returns
    -------
    numpy.ndarray, numpy.ndarray, numpy.ndarray
        Numbers of products ``(P,)``, residual norms and values ``(P, k)``, NaN where there
        were fewer than ``k``.
    """
    X, Y = pairs.matrices()
    ritz = pairs.ritz(X, Y)
    numbers = np.array(pairs.numbers)[ritz.leading]
    points = list(pairs.past)
    ends = np.append(np.flatnonzero(np.diff(numbers)) + 1, len(numbers))  # of whole blocks
    picked = np.unique(np.linspace(0, len(ends) - 1, min(_POINTS, len(ends))).astype(int))
    for size in ends[picked]:
        found, _, residuals = ritz.values(size)
        points.append((int(numbers[size - 1]), found, residuals))
    values = np.full((len(points), k), np.nan)
    norms = np.full((len(points), k), np.nan)
    for i, (_, found, residuals) in enumerate(points):
        some = chosen(found, k, which)
        # the smallest of all has a column of its own, and so has the largest
        place = slice(len(some)) if which == "SA" else slice(k - len(some), k)
        values[i, place], norms[i, place] = found[some], residuals[some]
    return np.array([number for number, _, _ in points]), norms, values


def _least(dtype: torch.dtype) -> float:
    """How much of a vector has to be new, so that rounding is not blown up too far."""
    return float(torch.finfo(dtype).eps ** (1 / 3))
