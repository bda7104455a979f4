"""One rank decides, the others serve: solvers that are written for one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace
from torchlinop.distributed.ranks import ProcessRanks, process_ranks

Thing = TypeVar("Thing")

#: numbers before the vector: what is to be done, with which operator, how many columns
_HEADER = 3
_STOP, _FORWARD, _ADJOINT = 0, 1, 2


@contextmanager
def driver(*operators: TorchLinearOperator, process_group: Any = None) -> Iterator[Any]:
    """Let rank 0 multiply; the other ranks do what is needed for it until the block ends.

    Solvers are written for one process: two ranks that run the same solver and whose
    LAPACK rounds differently part ways. So only rank 0 runs it. A product costs one
    broadcast of the vector and one all-reduce of the result.

    An error or Ctrl-C on any rank ends the block on all of them with that error. While
    rank 0 computes something else the others wait, as long as the timeout of the process
    group allows.

    Parameters
    ----------
    *operators
        The same ones on every rank, of one dtype and device. They may be made of others:
        ``H + damping * identity``.
    process_group
        Of :mod:`torch.distributed`; by default all processes.

    Yields
    ------
    TorchLinearOperator or None
        On rank 0 the operator for solvers, inverses, estimators and preconditioners, or
        a tuple of several; on the other ranks None, or a tuple of them, when the block is
        over on rank 0.

    Raises
    ------
    ValueError
        The ranks have different operators, or operators of several dtypes or devices.
    RuntimeError
        The process group is not initialized, or has a driver already.
    LostRankError
        A rank has ended.

    Examples
    --------
    Started by ``torchrun --nproc-per-node=2``, each process with its share of the data::

        group = torch.distributed.group.WORLD
        H = HessianLinearOperator(model, loss, params, share, process_group=group)
        eigenvalues = None
        with torchlinop.distributed.driver(H) as A:
            if A is not None:
                eigenvalues = eigsh(A, k=10, return_eigenvectors=False)
        eigenvalues = torchlinop.distributed.broadcast(eigenvalues)
    """
    ranks = process_ranks(dist.group.WORLD if process_group is None else process_group)
    session = _Session(ranks, operators)
    ranks.driven = True
    try:
        if ranks.rank:
            session.serve()
            yield None if len(operators) == 1 else (None,) * len(operators)
            return
        driven = tuple(_Driven(session, i, A) for i, A in enumerate(operators))
        try:
            yield driven[0] if len(driven) == 1 else driven
        except BaseException as error:
            session.end(error)
            raise
        session.end(None)
    finally:
        ranks.driven = False


def broadcast(thing: Thing, *, process_group: Any = None) -> Thing:
    """Return what rank 0 has, on every rank: results of a solver, for instance.

    Parameters
    ----------
    thing
        Whatever can be pickled. What other ranks than 0 pass does not matter.
    process_group
        Of :mod:`torch.distributed`; by default all processes.
    """
    ranks = process_ranks(dist.group.WORLD if process_group is None else process_group)
    told = ranks.together(lambda: thing if ranks.rank == 0 else None, "broadcasting")
    return told[0]  # type: ignore[return-value]


class _Session:
    """What the ranks of a driver have in common: commands, and an end.

    Parameters
    ----------
    ranks
        The ranks.
    operators
        Those that rank 0 may multiply with.
    """

    def __init__(
        self, ranks: ProcessRanks, operators: Sequence[TorchLinearOperator]
    ) -> None:
        if not operators:
            raise ValueError("driver() needs an operator.")
        if ranks.driven:
            raise RuntimeError(
                "The process group has a driver already. Give all operators to that one: "
                "driver(H, G)."
            )
        facts = [
            f"{type(A).__name__} {A.shape} {A.torch_dtype} {A.device.type}"
            for A in operators
        ]
        told = ranks.together(lambda: facts, "starting a driver")
        for rank, others in enumerate(told):
            if others != told[0]:
                raise ValueError(
                    f"The ranks have different operators: {', '.join(told[0])} on rank 0 "
                    f"and {', '.join(others)} on rank {rank}. Build the same on every rank."
                )
        kinds = {(A.torch_dtype, A.device) for A in operators}
        if len(kinds) > 1:
            raise ValueError(
                "The operators of a driver need one dtype and device, got "
                f"{', '.join(facts)}. Use one driver after the other."
            )
        self._ranks = ranks
        self._operators = operators
        dtype, device = operators[0].torch_dtype, operators[0].device
        self._like = torch.empty(0, dtype=dtype, device=device)
        #: length of the first message of each command, which fits into the shortest one
        self._first = _HEADER + min(min(A.shape) for A in operators)
        self._over = False

    # ------------------------------------------------------------------ on rank 0

    def product(self, index: int, x: Tensor, *, adjoint: bool) -> Tensor:
        """Tell all ranks to multiply, and do so."""
        ranks = self._ranks
        with ranks.line.lock, ranks.line.interrupts.held():
            if self._over:
                raise RuntimeError("The driver's block is over: its operators have ended.")
            self._send(_ADJOINT if adjoint else _FORWARD, index, x)
            return self._multiply(index, x, adjoint=adjoint)

    def end(self, error: BaseException | None) -> None:
        """Let the other ranks go on, or raise an error everywhere."""
        if self._over:
            return
        with self._ranks.line.interrupts.held():
            self._send(_STOP, 0, self._like)
            self._leave(error)

    def _send(self, command: int, index: int, x: Tensor) -> None:
        columns = x.shape[1] if x.ndim == 2 else 0
        header = torch.tensor([command, index, columns], device="cpu")
        size = max(self._first, _HEADER + x.numel())
        message = self._like.new_empty(size)
        message[:_HEADER] = header.to(message)
        message[_HEADER : _HEADER + x.numel()] = x.reshape(-1)
        self._broadcast(message[: self._first])
        if size > self._first:
            self._broadcast(message[self._first :])

    # ------------------------------------------------------------ on the other ranks

    def serve(self) -> None:
        """Do what rank 0 tells, until it ends."""
        with self._ranks.line.interrupts.held():
            while True:
                first = self._like.new_empty(self._first)
                self._broadcast(first)
                command, index, columns = map(int, first[:_HEADER].real.tolist())
                if command == _STOP:
                    return self._leave(None)
                adjoint = command == _ADJOINT
                size = self._operators[index].shape[0 if adjoint else 1]
                numel = size * columns
                message = first
                if _HEADER + numel > self._first:
                    message = self._like.new_empty(_HEADER + numel)
                    message[: self._first] = first
                    self._broadcast(message[self._first :])
                x = message[_HEADER : _HEADER + numel].view(size, columns)
                self._multiply(index, x, adjoint=adjoint)

    # -------------------------------------------------------------------- on all ranks

    def _broadcast(self, part: Tensor) -> None:
        """Send a part of a message, or receive it."""
        try:
            self._ranks.line.broadcast(part, "waiting for rank 0")
        except BaseException:
            self._over = True
            raise

    def _multiply(self, index: int, x: Tensor, *, adjoint: bool) -> Tensor:
        operator = self._operators[index]
        line = self._ranks.line
        try:
            with self._ranks.told():
                chosen = operator._adjoint() if adjoint else operator
                return chosen._product(x)
        except BaseException as error:
            self._over = True
            if error is not line.raised:  # the others do not know
                line.leave(f"{type(error).__name__}: {error}")
            raise

    def _leave(self, error: BaseException | None) -> None:
        """Say goodbye: whoever has an error tells it now."""
        self._over = True

        def say() -> None:
            if error is not None:
                raise error

        with self._ranks.told():
            self._ranks.together(say, "ending a driver")


class _Driven(TorchLinearOperator):
    """On rank 0, an operator whose products all ranks compute."""

    def __init__(
        self,
        session: _Session,
        index: int,
        operator: TorchLinearOperator,
        origin: _Driven | None = None,
    ) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self._session = session
        self._index = index
        self._operator = operator
        self._origin = origin
        space = vars(operator).get("space")
        if isinstance(space, ParameterSpace):
            self.space = space

    def _apply(self, x: Tensor) -> Tensor:
        adjoint = self._origin is not None
        return self._session.product(self._index, x, adjoint=adjoint)

    def _adjoint(self) -> TorchLinearOperator:
        if self._origin is not None:
            return self._origin
        adjoint = self._operator._adjoint()
        if adjoint is self._operator:
            return self
        return _Driven(self._session, self._index, adjoint, origin=self)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, driving {self._operator!r}>"
