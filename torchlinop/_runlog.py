"""What a monitor has seen: numbers of products, their times, and what follows from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor, import_array
from torchlinop._pairs import Pairs, Which, check_choice, chosen, least_squares, ritz_curve
from torchlinop._typing import Array
from torchlinop.estimate import Eigenpairs
from torchlinop.solve.columns import column_norms


class Iterate(NamedTuple):
    """The best solution in the span of the vectors that were multiplied."""

    #: of the kind of the right-hand side, shape (N,)
    x: Array
    #: ``|b - A x|``
    residual_norm: float
    #: the same over ``|b|``
    relative_residual: float


@dataclass(frozen=True, eq=False)
class Convergence:
    """How far a run was after how many products.

    Attributes
    ----------
    what : str
        ``"eigenvalues"`` or ``"solution"``.
    products : numpy.ndarray
        Numbers of products, shape ``(P,)``.
    residual_norms : numpy.ndarray
        Of the Ritz pairs, shape ``(P, k)``, NaN where there was none yet; of a solution
        relative to the right-hand side, shape ``(P, 1)``.
    values : numpy.ndarray
        Ritz values, shape ``(P, k)``; of a solution empty.
    """

    what: str
    products: np.ndarray
    residual_norms: np.ndarray
    values: np.ndarray


@dataclass(eq=False)
class RunLog:
    """The products of one run.

    Attributes
    ----------
    operator : str
        What was watched, as it prints.
    shape : tuple of int
        Of the operator.
    began : str
        Date and time (UTC).
    max_products, max_seconds
        The budget, or None.
    stopped : str
        Why the run was ended: empty (it was not), ``"max_products"``, ``"max_seconds"`` or
        ``"interrupt"``.
    elapsed : float
        Seconds between entering and leaving the ``with`` block, 0 before that.
    products : list of tuple
        For each product when it began, in seconds since the beginning, the seconds that it
        took, how many vectors it had, and whether it was with the adjoint.
    """

    operator: str
    shape: tuple[int, int]
    began: str
    max_products: int | None = None
    max_seconds: float | None = None
    stopped: str = ""
    elapsed: float = 0.0
    products: list[tuple[float, float, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pairs: Pairs | None = None
        self._saved: Convergence | None = None

    @property
    def num_products(self) -> int:
        """How many products there were; a block of vectors is one."""
        return len(self.products)

    @property
    def num_columns(self) -> int:
        """How many vectors were multiplied."""
        return sum(columns for _, _, columns, _ in self.products)

    @property
    def seconds(self) -> np.ndarray:
        """What each product took, shape ``(num_products,)``."""
        return np.array([seconds for _, seconds, _, _ in self.products])

    def eigenpairs(
        self, k: int = 6, *, which: Which = "LM", tol: float = 1e-5
    ) -> Eigenpairs:
        """Ritz pairs in the span of the vectors that were multiplied so far.

        For a Hermitian operator. No product is computed; the residuals are true ones.

        Parameters
        ----------
        k
            How many; fewer are returned if the span is smaller.
        which
            The largest (``"LA"``), smallest (``"SA"``) or largest in size (``"LM"``).
        tol
            Residuals that count as converged, relative to the largest Ritz value.

        Returns
        -------
        Eigenpairs
            Unpacks as SciPy's pair of values and vectors.

        Raises
        ------
        ValueError
            No vectors were kept, or the operator is not Hermitian.
        """
        pairs = self._kept()
        X, Y = pairs.matrices()
        ritz = pairs.ritz(X, Y)
        values, S, _ = ritz.values(len(ritz.leading))
        wanted = S[:, chosen(values, k, which)]
        c = torch.as_tensor(ritz.combinations @ wanted, device=X.device)
        V, W = X.to(c.dtype) @ c, Y.to(c.dtype) @ c
        lengths = torch.linalg.vector_norm(V, dim=0)
        V, W = V / lengths, W / lengths
        theta = (V.conj() * W).sum(dim=0).real
        real = theta.dtype if X.dtype in (torch.float64, torch.complex128) else X.real.dtype
        norms = column_norms(W - V * theta)
        converged = norms <= tol * np.abs(values).max()
        return Eigenpairs(theta.to(real), V.to(X.dtype), norms, converged, self.num_columns)

    def v0(self, k: int = 6, *, which: Which = "LM") -> np.ndarray | None:
        """Where an eigensolver may start: the sum of the ``k`` Ritz vectors.

        Shape ``(N,)``, for ``v0=`` of SciPy's and our ``eigsh``; None, which those take for
        a random vector, where no vectors were multiplied yet.
        """
        if self._pairs is None or not self._pairs.numbers:
            return None
        start = self.eigenpairs(k, which=which).eigenvectors.sum(dim=1)
        return start.cpu().resolve_conj().numpy()

    def x0(self, b: Array) -> Array | None:
        """Where a solver of ``A x = b`` may start: what :meth:`solution` gives, or None."""
        if self._pairs is None or not self._pairs.numbers:
            return None
        return self.solution(b).x

    def solution(self, b: Array) -> Iterate:
        """Return the ``x`` with the smallest ``|b - A x|`` in the span of these vectors.

        No product is computed. After more products than vectors are kept it is at least as
        good as what is left of them; ``monitor(A, b=b)`` keeps the best.

        Parameters
        ----------
        b
            The right-hand side, shape ``(M,)``.
        """
        X, Y, rhs = self._system(b)
        size = _length(rhs)
        pairs = self._kept()
        x, rest = torch.zeros_like(X[:, :1]).to(rhs.dtype), rhs
        for _ in range(2):  # a second time for what rounding has left
            found = least_squares(Y, rest, pairs.numbers)
            step = torch.as_tensor(found.combination, device=X.device)
            x, rest = x + X.to(rhs.dtype) @ step, rest - Y.to(rhs.dtype) @ step
        norm = float(column_norms(rest)[0])
        _, export = import_array(b, X.device, X.dtype)
        solution = export(
            x.to(torch.promote_types(X.dtype, as_tensor(b).dtype)).reshape(-1)
        )
        return Iterate(solution, norm, norm / size if size else norm)

    def convergence(
        self, k: int = 6, *, which: Which = "LM", b: Array | None = None
    ) -> Convergence:
        """How the Ritz pairs, or with ``b`` the best solution, improved with the products.

        Parameters
        ----------
        k, which
            As in :meth:`eigenpairs`.
        b
            The right-hand side of ``A x = b``.

        Returns
        -------
        Convergence
            The one that was saved if the log comes from a file.
        """
        if self._saved is not None:
            return self._saved
        pairs = self._kept()
        if b is None:
            products, norms, values = ritz_curve(pairs, k, which)
            return Convergence("eigenvalues", products, norms, values)
        _, Y, rhs = self._system(b)
        size = _length(rhs) or 1.0
        points = [*pairs.past_solutions, *least_squares(Y, rhs, pairs.numbers).curve]
        return Convergence(
            "solution",
            np.array([number for number, _ in points], dtype=int),
            np.array([[norm / size] for _, norm in points]).reshape(-1, 1),
            np.zeros((len(points), 0)),
        )

    def save(
        self,
        path: str | Path,
        *,
        k: int = 6,
        which: Which = "LM",
        b: Array | None = None,
    ) -> None:
        """Write the log as JSON, with its convergence if there is one.

        Parameters
        ----------
        path
            Name of the file.
        k, which, b
            Of which convergence; see :meth:`convergence`.
        """
        check_choice(k, which)
        record: dict[str, Any] = asdict(self)
        try:
            curve = self.convergence(k, which=which, b=b)
        except ValueError:  # no vectors, or no Hermitian operator
            record["convergence"] = None
        else:
            record["convergence"] = {
                "what": curve.what,
                "products": curve.products.tolist(),
                "residual_norms": _as_lists(curve.residual_norms),
                "values": _as_lists(curve.values),
            }
        Path(path).write_text(json.dumps(record, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> RunLog:
        """Read what :meth:`save` has written; vectors are not in it.

        Raises
        ------
        ValueError
            The file was not written by :meth:`save`.
        """
        text = Path(path).read_bytes()
        try:
            return cls._read(json.loads(text))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no log of a run, or not a whole one ({error!r}): "
                "RunLog.load reads what RunLog.save has written."
            ) from error

    @classmethod
    def _read(cls, record: dict[str, Any]) -> RunLog:
        curve = record.pop("convergence")
        record["shape"] = tuple(record["shape"])
        record["products"] = [tuple(product) for product in record["products"]]
        log = cls(**record)
        if curve is not None:
            log._saved = Convergence(
                curve["what"],
                np.array(curve["products"], dtype=int),
                _as_array(curve["residual_norms"], len(curve["products"])),
                _as_array(curve["values"], len(curve["products"])),
            )
        return log

    def __str__(self) -> str:
        count, seconds = self.num_products, self.elapsed or float(self.seconds.sum())
        each = f", {1e3 * float(np.median(self.seconds)):.2g} ms each" if count else ""
        wider = f" of {self.num_columns} vectors" if self.num_columns != count else ""
        ending = f"; stopped by {self.stopped}" if self.stopped else ""
        return f"{count} products{wider} in {seconds:.2g} s{each}{ending}"

    def _kept(self) -> Pairs:
        if self._pairs is None or not self._pairs.numbers:
            raise ValueError(
                "This log has no vectors: none were multiplied, max_vectors is 0, or it "
                "was read from a file."
            )
        return self._pairs

    def _system(self, b: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, products, and the right-hand side ``(M, 1)`` in double precision."""
        X, Y = self._kept().matrices()
        rhs = as_tensor(b, X.device)
        if rhs.numel() != self.shape[0]:
            raise ValueError(
                f"b has to have shape ({self.shape[0]},), got {tuple(rhs.shape)}."
            )
        wide = torch.promote_types(torch.promote_types(X.dtype, rhs.dtype), torch.float64)
        return X, Y, rhs.reshape(-1, 1).to(wide)


def _length(rhs: Tensor) -> float:
    return float(column_norms(rhs)[0])


def _as_lists(array: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(v) else v for v in row] for row in array.tolist()]


def _as_array(rows: list[list[float | None]], count: int) -> np.ndarray:
    filled = [[math.nan if v is None else v for v in row] for row in rows]
    return np.array(filled, dtype=float).reshape(count, -1 if count else 0)
