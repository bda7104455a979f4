"""The search for eigenpairs in a Krylov space: converge, look for what was missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchlinop._checkpoint import Run
from torchlinop.estimate.krylov import KrylovSpace

#: is told of products
Count: TypeAlias = Callable[[int], object]

#: fewest and most products with which is searched for what was missed
_CHECK = 3, 12
#: the part of all products that it takes at least
_CHECK_PART = 1 / 16


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues and eigenvectors, each with a bound of its residual.

    Unpacks like the pair that SciPy's ``eigsh`` returns:
    ``eigenvalues, eigenvectors = estimate.eigsh(A, k=10)``.

    Attributes
    ----------
    eigenvalues : torch.Tensor
        Shape ``(k,)``, ascending, real, on the operator's device.
    eigenvectors : torch.Tensor
        Shape ``(N, k)``, orthonormal.
    residual_bounds : numpy.ndarray
        Bounds of the 2-norms of ``A v - lambda v``, shape ``(k,)``: there is an eigenvalue
        within each of these.
    converged : numpy.ndarray of bool
        Which bounds have reached the tolerance, shape ``(k,)``.
    num_matvecs : int
        Vectors that were multiplied.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_bounds: np.ndarray
    converged: np.ndarray
    num_matvecs: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.eigenvalues, self.eigenvectors))

    def __str__(self) -> str:
        count = len(self.converged)
        lines = [
            f"{int(self.converged.sum())} of {count} eigenpairs converged "
            f"({self.num_matvecs} products)"
        ]
        lines += [
            f"  {value:12.6g} +- {bound:.1e}"
            for value, bound in zip(
                self.eigenvalues.tolist(), self.residual_bounds, strict=True
            )
        ]
        return "\n".join(lines)


class Found(NamedTuple):
    """Ritz pairs of a space."""

    theta: np.ndarray
    S: np.ndarray
    residuals: np.ndarray
    #: of the columns of ``S``: the wanted ones, and all that have converged, best first
    wanted: np.ndarray
    good: np.ndarray
    #: what residuals are to reach
    goal: float
    #: columns of unwanted ones that may still grow larger in size than a wanted one
    rivals: np.ndarray

    def pairs(self, space: KrylovSpace) -> Eigenpairs:
        """The wanted ones, ascending."""
        order = self.wanted[np.argsort(self.theta[self.wanted])]
        vectors = space.vectors(self.S[:, order])
        values = torch.as_tensor(
            self.theta[order], dtype=vectors.real.dtype, device=vectors.device
        )
        bounds = self.residuals[order]
        return Eigenpairs(
            values, vectors, bounds + space.rounding, bounds <= self.goal, space.num_matvecs
        )


def search(
    space: KrylovSpace, k: int, which: str, tol: float, limit: int, count: Count, run: Run
) -> Eigenpairs:
    """Find the wanted pairs, look for what was missed, and begin again if there is any.

    A ``run`` with a state goes on from that.
    """
    plan = None
    if run.state is not None:
        space.go_on(run.state["space"])
        plan = run.state["plan"]
    while True:
        found = _converge(space, k, which, tol, limit, count, run, plan)
        plan = None
        pairs = found.pairs(space)
        if space.complete or space.num_matvecs >= limit or not pairs.converged.all():
            return pairs
        kept = found.good[: max(k, space.capacity // 2)]
        space.restart(found.theta[kept], found.S[:, kept])
        if not _missed(space, found, which, limit, count):
            return replace(pairs, num_matvecs=space.num_matvecs)


def _converge(
    space: KrylovSpace,
    k: int,
    which: str,
    tol: float,
    limit: int,
    count: Count,
    run: Run,
    plan: list[float] | None,
) -> Found:
    """Extend and restart the space until the wanted pairs have converged.

    ``plan`` is what was intended in a state that was saved.
    """
    if space.size and (space.complete or space.num_matvecs >= limit):
        return look(space, k, which, tol)
    if space.size == space.capacity:  # the search for what was missed has filled it
        _shorten(space, k, which, look(space, k, which, tol))
    # size of the next look; number of products and logarithm of what was missing before
    first = max(k, space.size + 1) if space.size else max(k, min(2 * k, k + 4))
    due, *before = plan or (first, 0, math.inf)
    while True:
        if run.due():
            run.save({"space": space.state(), "plan": [due, *before]})
        space.step()
        count(1)
        last = space.num_matvecs >= limit or space.complete
        full = space.size == space.capacity
        if not (last or full or space.size >= due):
            continue
        found = look(space, k, which, tol)
        rest = found.residuals[found.wanted]
        missing = np.append(found.wanted[rest > found.goal], found.rivals)
        if last or not len(missing):
            return found
        space.turn_to(found.S[:, missing])
        if full:
            _shorten(space, k, which, found)
        now = [space.num_matvecs, math.log(max(rest.max() / found.goal, 1e-9))]
        rate = (before[1] - now[1]) / (now[0] - before[0])
        ahead = 0.4 * now[1] / rate if 0 < rate < math.inf else 1
        before, due = now, space.size + int(np.clip(ahead, 1, 1 + space.size // 8))


def _shorten(space: KrylovSpace, k: int, which: str, found: Found) -> None:
    """Restart with the wanted Ritz vectors and the next best; two places are left."""
    room = space.capacity - k
    kept = _order(found.theta, which)[: k + min(2 * room // 5, room - 2)]
    space.restart(found.theta[kept], found.S[:, kept])


def look(space: KrylovSpace, k: int, which: str, tol: float) -> Found:
    """Ritz pairs of the space as it is.

    Where a value that has not converged agrees with one that has, the latter is taken.
    """
    theta, S, residuals = space.ritz()
    goal = max(tol, 4 * space.eps) * space.norm
    order = _order(theta, which)
    good = order[residuals[order] <= goal]
    wanted = order[:k]
    if len(good) >= k and _agree(theta[good[:k]], theta[wanted], goal):
        wanted = good[:k]
    rivals = _rivals(theta, residuals, wanted, goal) if which == "LM" else order[:0]
    return Found(theta, S, residuals, wanted, good, goal, rivals)


def _rivals(
    theta: np.ndarray, residuals: np.ndarray, wanted: np.ndarray, goal: float
) -> np.ndarray:
    """The outermost value, if any, that is unwanted, not settled, and of the other sign.

    Both ends of a spectrum converge on their own, one perhaps long before the other. The
    value of the slower one may cross the size of the last that is wanted.
    """
    last = wanted[np.abs(theta[wanted]).argmin()]
    others = np.setdiff1d(np.flatnonzero(theta * theta[last] < 0), wanted)
    if not len(others):
        return others
    first = others[np.abs(theta[others]).argmax()]
    # within one residual is some eigenvalue; three, since it need not be the outermost
    crossing = abs(theta[first]) + 3 * residuals[first] > abs(theta[last])
    return others[others == first] if crossing and residuals[first] > goal else others[:0]


def _missed(space: KrylovSpace, found: Found, which: str, limit: int, count: Count) -> bool:
    """Whether there is something better in the rest of the space.

    A random vector has about ``N**-0.5`` of an eigenvector, and seldom less than a
    fiftieth of that. It grows in each step of Lanczos against all that lies between the
    unwanted values (Chebyshev polynomials).
    """
    values = found.theta[found.wanted]
    rest = np.delete(found.theta, found.wanted)
    steps = _CHECK[1]
    if len(rest) and rest.max() > rest.min():
        low, high = rest.min(), rest.max()
        # as far away as most of the wanted values
        distance = np.sort(np.maximum(values - high, low - values))[len(values) // 4]
        growth = math.acosh(1 + 2 * max(distance, 0) / (high - low))
        if growth > 0:
            needed = math.ceil(math.log(100 * math.sqrt(space.dim)) / growth)
            steps = int(np.clip(needed, *_CHECK))
    steps = max(steps, int(_CHECK_PART * space.num_matvecs))
    steps = min(steps, space.capacity - space.size, limit - space.num_matvecs)
    space.start_afresh()
    for step in range(1, steps + 1):
        space.step()
        count(1)
        if step % 4 == 0 or step == steps or space.complete:
            theta = space.ritz()[0]
            best = theta[_order(theta, which)[: len(values)]]
            if not _agree(best, values, found.goal):
                return True
            if space.complete:
                break
    return False


def _agree(values: np.ndarray, others: np.ndarray, goal: float) -> bool:
    """Whether two sets of values are the same to what residuals allow."""
    return bool(np.abs(np.sort(values) - np.sort(others)).max() <= 2 * goal)


def _order(theta: np.ndarray, which: str) -> np.ndarray:
    """Indices of ascending values, the most wanted first."""
    up = np.arange(len(theta))
    if which == "SA":
        return up
    if which == "LA":
        return up[::-1]
    if which == "LM":
        return np.argsort(-np.abs(theta), kind="stable")
    ends = np.empty(len(theta), dtype=int)
    ends[0::2] = up[::-1][: (len(theta) + 1) // 2]
    ends[1::2] = up[: len(theta) // 2]
    return ends
