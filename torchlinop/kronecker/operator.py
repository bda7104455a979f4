"""What KFAC, EKFAC and KFOC share as operators."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from torchlinop._files import StoredFileError, as_described
from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace, named_parameters
from torchlinop._typing import Parameters, Scalar
from torchlinop.autodiff.recording import EXCLUSIVE
from torchlinop.data import DataChangedError
from torchlinop.kronecker.damping import damped_inverse
from torchlinop.kronecker.settings import Settings
from torchlinop.kronecker.storage import REMEDY, load_matrix, save_matrix
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    KroneckerLinearOperator,
    StructuredLinearOperator,
)


class BlockwiseLinearOperator(StructuredLinearOperator):
    """A block-diagonal approximation that is computed from a model and its data.

    Not to be made by users. Its matrix follows changes of parameters and data: what is
    computed belongs to one look at them. Multiples, powers, and sums and products with
    block-diagonal matrices of the same blocks are block diagonal, made of the matrix as it
    is now: they no longer follow the model. Sums and products with others do.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.
    settings : Settings
        What was asked for.
    """

    def __init__(self, risk: EmpiricalRisk, settings: Settings) -> None:
        self._start(risk, risk.space, settings)
        self._current()

    def _start(
        self, risk: EmpiricalRisk | None, space: ParameterSpace, settings: Settings
    ) -> None:
        super().__init__((space.dim, space.dim), space.dtype, space.device)
        self._risk = risk
        self.space = space
        self.settings = settings
        self._known: tuple[int, BlockDiagonalLinearOperator] | None = None

    @abstractmethod
    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        """Compute the matrix."""

    def _current(self) -> BlockDiagonalLinearOperator:
        """Return the matrix as it is now; an interrupt leaves the old one."""
        if self._risk is None:  # from a file
            assert self._known is not None
            return self._known[1]
        with EXCLUSIVE:
            ranks = self._risk.options.ranks
            if any(ranks.together(self._risk.changed, "looking for changes")):
                self._risk.survey()
            if self._known is None or self._known[0] != self._risk.looks:
                self._compute_anew(self._risk)
            assert self._known is not None
            return self._known[1]

    def _compute_anew(self, risk: EmpiricalRisk) -> None:
        try:
            matrix = self._computed(risk)
        except DataChangedError:
            risk.survey()
            matrix = self._computed(risk)
        self._known = (risk.looks, matrix)

    def refresh(self) -> None:
        """Compute everything anew, after changes that could not be noticed.

        After an error or an interrupt the matrix is what it was.
        """
        if self._risk is not None:
            with EXCLUSIVE:
                self._risk.survey()
                self._compute_anew(self._risk)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a look: a copy looks anew."""
        forgotten = {} if self._risk is None else {"_known": None}
        # of SciPy's class: since 1.18 it has something in it that cannot be pickled
        return {**super().__getstate__(), **forgotten}

    # ------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix as it is now to a file, by safetensors (no pickle).

        Factors, decompositions as far as they are known, names and shapes of the
        parameters, settings, versions.

        Parameters
        ----------
        path
            File to write.

        Raises
        ------
        ImportError
            safetensors is not installed.
        """
        facts = {
            "operator": type(self).__name__,
            "settings": dataclasses.asdict(self.settings),
            "names": list(self.space.names),
            "shapes": [list(shape) for shape in self.space.shapes],
            "dtype": str(self.space.parameter_dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__},
        }
        save_matrix(path, self._current(), facts)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        params: Parameters | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return the operator that :meth:`save` wrote: a fixed matrix, without its model.

        Parameters
        ----------
        path
            File to read.
        params
            The model's parameters, to be compared with those in the file: by name, or
            those of a list in their order.
        device
            Where the operator is to be.

        Raises
        ------
        StoredFileError
            The file is truncated or was not written by :meth:`save`, holds another kind of
            operator, or does not fit ``params`` (the error says what differs).
        TypeError
            ``params`` holds something else than tensors.
        ImportError
            safetensors is not installed.
        """
        device = torch.device(device)
        matrix, facts = load_matrix(path, device)
        if facts.get("operator") != cls.__name__:
            raise StoredFileError(
                f"{os.fspath(path)} holds a {facts.get('operator')}; use its load."
            )
        with as_described(path, REMEDY):
            settings = Settings.of_values(facts["settings"])
            space = _space_of(facts, matrix)
        if params is not None:
            stored = dict(zip(space.names, map(tuple, space.shapes), strict=True))
            _require_same(path, stored, _shapes(params, space.names))
        operator = cls.__new__(cls)
        operator._start(None, space, settings)
        operator._known = (0, matrix)
        return operator

    # ------------------------------------------------------------------- the matrix

    @property
    def matrix(self) -> BlockDiagonalLinearOperator:
        """The matrix as it is now: it does not follow later changes."""
        return self._current()

    @property
    def blocks(self) -> dict[tuple[str, ...], TorchLinearOperator]:
        """The blocks by the names of their parameters."""
        matrix = self._current()
        groups = matrix.layout.groups  # type: ignore[attr-defined]
        return {g.names: b for g, b in zip(groups, matrix.blocks, strict=True)}

    @property
    def precisions(self) -> dict[tuple[str, ...], tuple[torch.dtype, ...]]:
        """In which dtypes the factors of each block were decomposed, as far as they are.

        float64 where the operator is float32: there the decomposition had failed in
        float32, which was a warning. Nothing is noted of EKFAC's bases.
        """
        return {names: tuple(_precisions(block)) for names, block in self.blocks.items()}

    def _apply(self, x: Tensor) -> Tensor:
        return self._current()._product(x)

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def _fixed(self) -> StructuredLinearOperator:
        return self._current()

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        matrix = self._current()
        partner = matrix._partner(other)
        return super()._plus(other) if partner is None else matrix._plus(partner)

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        matrix = self._current()
        partner = matrix._partner(other)
        return super()._times(other) if partner is None else matrix._times(partner)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return self._current()._scaled(alpha)

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        return self._current()._raised(p)

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        return self._current().diagonal()

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return self._current().trace()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return self._current().frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        return self._current().slogdet()

    def power(self, exponent: float) -> BlockDiagonalLinearOperator:
        """Return a power of the matrix as it is now."""
        return self._current().power(exponent)

    def inverse(
        self, *, damping: float = 0.0, strategy: str = "exact", min_damping: float = 0.0
    ) -> BlockDiagonalLinearOperator:
        r"""Return the inverse of the damped matrix as it is now.

        A fixed matrix, which does not follow later changes of the parameters. All
        dampings and strategies share one eigendecomposition for each factor.

        Parameters
        ----------
        damping
            :math:`\delta \ge 0`.
        strategy
            ``"exact"``: :math:`(B \otimes A + \delta I)^{-1}`. ``"plain"``:
            :math:`(B + \delta I)^{-1} \otimes (A + \delta I)^{-1}`. ``"heuristic"``:
            :math:`(B + \sqrt\delta/\pi\, I)^{-1} \otimes (A + \sqrt\delta\,\pi I)^{-1}`
            with :math:`\pi^2` the quotient of the mean eigenvalues of the factors. Blocks
            that are no Kronecker product, among them those of a bias alone, are damped
            exactly.
        min_damping
            For ``"heuristic"``, the least damping of a factor.

        Raises
        ------
        ValueError
            A damped factor is singular (the error gives its smallest eigenvalue), or the
            strategy is unknown.

        Warns
        -----
        ConvergenceWarning
            The float32 decomposition of a factor has failed, and a float64 one is used;
            ``precisions`` says of which blocks.

        References
        ----------
        Martens and Grosse (2015), section 6.3
        """
        return damped_inverse(self._current(), damping, strategy, min_damping)


def _precisions(block: TorchLinearOperator) -> Iterator[torch.dtype]:
    if isinstance(block, BlockDiagonalLinearOperator):  # groups
        for part in block.blocks:
            yield from _precisions(part)
    elif isinstance(block, KroneckerLinearOperator):
        yield from (spectrum.precision for spectrum in block.known_spectra() or ())


def _space_of(facts: dict[str, Any], matrix: BlockDiagonalLinearOperator) -> ParameterSpace:
    """Return the parameters that a file names, which its matrix has to be of."""
    dtype = getattr(torch, facts["dtype"])
    named = dict(zip(facts["names"], facts["shapes"], strict=True))
    space = ParameterSpace(
        {n: torch.empty(s, dtype=dtype, device=matrix.device) for n, s in named.items()}
    )
    if tuple(space.sizes) != tuple(facts["sizes"]) or space.dtype != matrix.torch_dtype:
        raise ValueError(
            f"parameters of {space.sizes} entries in {space.dtype}, blocks for "
            f"{facts['sizes']} in {matrix.torch_dtype}"
        )
    return space


def _shapes(params: Parameters, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; parameters of a list are called as those of the file."""
    given = ParameterSpace(named_parameters(None, params))
    if not isinstance(params, Mapping):
        further = [f"params[{i}]" for i in range(len(names), len(given.names))]
        return dict(zip([*names, *further], map(tuple, given.shapes), strict=False))
    return dict(zip(given.names, map(tuple, given.shapes), strict=True))


def _require_same(
    path: Any, stored: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a file of other parameters."""
    differences = [f"{n} is missing in the file" for n in given if n not in stored]
    differences += [f"{n} is in the file only" for n in stored if n not in given]
    differences += [
        f"{n} has shape {given[n]}, in the file {shape}"
        for n, shape in stored.items()
        if n in given and given[n] != shape
    ]
    if not differences and list(given) != list(stored):
        differences = [f"the order is {list(given)}, in the file {list(stored)}"]
    if differences:
        raise StoredFileError(
            f"{os.fspath(path)} does not fit these parameters: {'; '.join(differences)}."
        )
