"""What two calls of torch.distributed need around them: errors, interrupts, lost ranks."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop._spread import whole
from torchlinop.distributed.interrupts import HeldInterrupts

if dist.is_available():
    # first imported with a process group, as by torch.func, it would keep the group for
    # ever, whose threads then may abort Python at its end
    import torch.distributed.nn

#: seconds between two looks at whether another rank is in trouble
_LOOK = 0.5
#: seconds that ranks have to say that they are there, once one is missing
_GRACE = 2.0


class LostRankError(RuntimeError):
    """Another rank has ended, or did not answer in time.

    Attributes
    ----------
    ranks : list of int
        Those that did not answer.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> Any:
        return type(self), (self.args[0], self.ranks)


class Line:
    """The connection of this rank with the others of a process group.

    Parameters
    ----------
    group
        A process group that this process belongs to.

    Attributes
    ----------
    rank, size : int
        Of this process in the group, and how many there are.
    device : torch.device
        Where objects travel.
    lock
        Held during a conversation: one thread at a time.
    interrupts : HeldInterrupts
    raised : BaseException or None
        The last error that was raised on every rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        #: not to outlive ``destroy_process_group``, which ends its threads
        self._reference = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)
        self.lock = threading.RLock()
        self.interrupts = HeldInterrupts()
        self.raised: BaseException | None = None

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if group is None:
            raise RuntimeError("The process group has been destroyed.")
        return group

    @property
    def device(self) -> torch.device:
        """Where objects travel."""
        if dist.get_backend(self._group) == dist.Backend.NCCL:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    # ----------------------------------------------------------------- the two calls

    def all_reduce(self, tensor: Tensor, what: str) -> None:
        """Add up a tensor over the ranks, in place."""
        group = self._group
        self._finish(
            lambda: dist.all_reduce(tensor, group=group, async_op=True), tensor, what
        )

    def broadcast(self, tensor: Tensor, what: str) -> None:
        """Overwrite a tensor with that of rank 0."""
        group = self._group
        self._finish(
            lambda: dist.broadcast(tensor, self._first, group=group, async_op=True),
            tensor,
            what,
        )

    def whole(self, tensor: Tensor, what: str) -> Tensor:
        """Gather a tensor that is spread over the ranks."""
        try:
            return whole(tensor)
        except RuntimeError as error:
            if "No backend type" in str(error):
                raise
            raise self._lost(error, what) from error

    def _finish(self, start: Callable[[], Any], tensor: Tensor, what: str) -> None:
        try:
            work = start()
            while not self._over(work, tensor.device):
                if self._store_holds("trouble"):
                    raise RuntimeError("another rank is in trouble")
        except RuntimeError as error:
            if "No backend type" in str(error):  # NCCL and a CPU, for instance
                raise
            raise self._lost(error, what) from error
        except KeyboardInterrupt:
            self.leave("ended by Ctrl-C")
            raise

    def _over(self, work: Any, device: torch.device) -> bool:
        """Wait for a while, such that an interrupt is seen; say whether work is done."""
        if device.type == "cpu":
            try:
                work.wait(timedelta(seconds=_LOOK))
            except RuntimeError:
                if not work.is_completed():
                    return False
                work.wait()  # raises what is wrong, unless it was done just now
            return True
        work.wait()  # orders the streams
        start = time.perf_counter()
        while not work.is_completed():
            waited = time.perf_counter() - start
            if waited > _LOOK:
                return False
            time.sleep(min(1e-3, waited / 16))
        return True

    # ------------------------------------------------------------------------ objects

    def gather(self, thing: Any, what: str) -> list[Any]:
        """Return what every rank has, by rank. Any object that can be pickled."""
        device = self.device
        data = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=device)
        sizes[self.rank] = len(data)
        self.all_reduce(sizes, what)
        ends = sizes.cumsum(0).tolist()
        places = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        whole = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        whole[places[self.rank]] = data.to(device)
        self.all_reduce(whole, what)
        content = whole.cpu().numpy()
        return [pickle.loads(content[place].tobytes()) for place in places]

    # ------------------------------------------------------------------------- errors

    def raise_together(self, own: BaseException | None, what: str) -> NoReturn:
        """Raise the same error on every rank, once every rank knows that there is one.

        That of the first rank that has one, and an interrupt before all others.
        """
        told = self.gather(None if own is None else _portable(own, self), what)
        errors = {rank: error for rank, error in enumerate(told) if error is not None}
        rank = min(errors, key=lambda r: (isinstance(errors[r], Exception), r))
        self.raised = own if rank == self.rank else errors[rank]
        assert self.raised is not None
        raise self.raised

    def leave(self, reason: str) -> None:
        """Tell ranks that will miss this one why it has gone."""
        self._store_set(f"left/{self.rank}", reason)
        self._store_set("trouble", str(self.rank))

    def _lost(self, error: RuntimeError, what: str) -> LostRankError:
        """Find out who is missing."""
        self._store_set(f"here/{self.rank}", what)
        self._store_set("trouble", str(self.rank))
        others = [rank for rank in range(self.size) if rank != self.rank]
        if self.size > 2:  # else there is no question
            end = time.perf_counter() + _GRACE
            while time.perf_counter() < end and not all(map(self._has_said, others)):
                time.sleep(0.02)
        missing = [rank for rank in others if not self._store_holds(f"here/{rank}")]
        reasons = {rank: self._store_get(f"left/{rank}") for rank in missing}
        names = ", ".join(
            f"rank {rank} ({reasons[rank] or 'killed, or busy with something else'})"
            for rank in missing
        )
        gone = names or "the connection: the others have given up waiting for it"
        return LostRankError(
            f"Rank {self.rank} of {self.size} lost {gone} while {what}. The process group "
            "cannot be used any more; start the ranks again. torch.distributed says: "
            f"{str(error).splitlines()[0][:200]}",
            missing,
        )

    def _has_said(self, rank: int) -> bool:
        return self._store_holds(f"here/{rank}") or self._store_holds(f"left/{rank}")

    # --------------------------------------------------- the store that started the group

    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self._group)

    def _store_set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception):  # the process that has it may have ended
            self._store().set(f"torchlinop/{key}", value)

    def _store_holds(self, key: str) -> bool:
        try:
            return bool(self._store().check([f"torchlinop/{key}"]))
        except Exception:
            return False

    def _store_get(self, key: str) -> str:
        if not self._store_holds(key):
            return ""
        return bytes(self._store().get(f"torchlinop/{key}")).decode(errors="replace")


def _portable(error: BaseException, line: Line) -> BaseException:
    """Return an error that other ranks can raise: with a note of where it comes from."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    frames = "".join(traceback.format_exception(error))
    copy.add_note(f"Raised on rank {line.rank} of {line.size}:\n{frames}")
    return copy
