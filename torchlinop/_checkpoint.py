"""Runs that survive: what a long computation writes now and then, to go on from."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchlinop._convergence import users_frame
from torchlinop._files import StoredFileError, as_described, read, safetensors, write
from torchlinop._operator import TorchLinearOperator

#: of the files written here; files of other versions are refused
FORMAT = "torchlinop-checkpoint-1"
_REMEDY = "Delete it to begin anew, or pass another path."
#: parts of a vector of which a fingerprint has a number each
_PARTS = 64

State: TypeAlias = dict[str, Any]


class Checkpoint:
    """A file from which a run goes on after it was killed.

    The run writes its state every so many seconds, beside the file, and puts that in its
    place at once: whenever it ends, the file is whole. The same call with the same file
    goes on from there, to the same answer as to rounding; once that is reached, it is in
    the file. Nothing is lost but the time since the last writing.

    A file of another matrix, or of a call with other arguments, is refused with what
    differs. For that the product with one random vector is computed at the beginning. A
    full disk is a warning: the run goes on, and the last file stays.

    Parameters
    ----------
    path
        The file; it needs the memory of the run's vectors, twice while it is written.
    seconds
        Between two writings: 0 writes after each step.

    Examples
    --------
    >>> import tempfile, torch
    >>> from torchlinop import Checkpoint, estimate
    >>> A = torch.diag(torch.arange(1.0, 101.0))
    >>> path = tempfile.mkdtemp() + "/run.safetensors"
    >>> pairs = estimate.eigsh(A, k=2, checkpoint=Checkpoint(path, seconds=60))
    >>> again = estimate.eigsh(A, k=2, checkpoint=path)  # is read from the file
    >>> torch.equal(again.eigenvalues, pairs.eigenvalues)
    True
    """

    def __init__(self, path: str | os.PathLike[str], *, seconds: float = 60.0) -> None:
        self.path = os.fspath(path)
        self.seconds = float(seconds)
        if not self.seconds >= 0:
            raise ValueError(f"seconds has to be at least 0, got {seconds!r}.")

    @classmethod
    def of(
        cls, checkpoint: Checkpoint | str | os.PathLike[str] | None
    ) -> Checkpoint | None:
        """Return a checkpoint that is given as one, or by its path."""
        if checkpoint is None or isinstance(checkpoint, Checkpoint):
            return checkpoint
        return cls(checkpoint)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, seconds={self.seconds:g})"

    def begin(
        self,
        name: str,
        operators: Mapping[str, TorchLinearOperator | None],
        arguments: Mapping[str, Any],
        vectors: Mapping[str, Tensor | None],
    ) -> Run:
        """Read the file, if there is one, and say what a run has to remember.

        Parameters
        ----------
        name
            Of what runs.
        operators
            The first one is that of the run. One product with each is computed.
        arguments
            Plain values that have to be the same.
        vectors
            Shapes ``(N,)`` or ``(N, K)``: what has to be the same to rounding.

        Raises
        ------
        StoredFileError
            The file is of something else, or truncated.
        FileNotFoundError
            There is no such folder.
        IsADirectoryError
            The path is that of a folder.
        """
        safetensors()  # now, and not when there is something to lose
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"There is no folder {folder} to write a checkpoint to."
            )
        if os.path.isdir(self.path):
            raise IsADirectoryError(
                f"{self.path} is a folder. Pass the path of a file in it for a checkpoint."
            )
        first = next(A for A in operators.values() if A is not None)
        generator = torch.Generator("cpu").manual_seed(0)
        longest = max(first.shape)
        drawn = torch.randn(
            2, longest, generator=generator, dtype=torch.float64, device="cpu"
        )
        z, other = drawn.to(first.device)  # z^T A z would not see a skew-symmetric part
        prints = {
            what: _fingerprint(_image(A, z), other)
            for what, A in operators.items()
            if A is not None
        }
        prints |= {
            what: _fingerprint(v, other) for what, v in vectors.items() if v is not None
        }
        facts = {
            "run": name,
            "shape": list(first.shape),
            "dtype": str(first.torch_dtype).removeprefix("torch."),
            **arguments,
        }
        # as they will be read: NumPy's integers, say, are numbers
        facts = json.loads(json.dumps(facts, default=np.generic.item))
        run = _FileRun(self, facts, prints)
        if os.path.exists(self.path):
            tolerance = torch.finfo(first.torch_dtype).eps ** (2 / 3)
            run.state = _read(self.path, facts, prints, tolerance)
        return run


class Run:
    """What a run remembers: here nothing, for runs without a file.

    Attributes
    ----------
    state : dict or None
        What was saved by an earlier process; its tensors are on the host.
    """

    state: State | None = None

    def due(self) -> bool:
        """Whether it is time to save."""
        return False

    def save(self, state: State) -> None:
        """Save numbers, tensors and arrays, in dicts and lists."""

    def part(self, state: State | None, whole: Callable[[State], State]) -> Run:
        """Return the run of a part, whose states are saved as ``whole(state)``."""
        return _PartOfRun(self, state, whole)


class _PartOfRun(Run):
    def __init__(
        self, run: Run, state: State | None, whole: Callable[[State], State]
    ) -> None:
        self._run, self.state, self._whole = run, state, whole

    def due(self) -> bool:
        return self._run.due()

    def save(self, state: State) -> None:
        self._run.save(self._whole(state))


class _FileRun(Run):
    def __init__(
        self, checkpoint: Checkpoint, facts: State, prints: dict[str, Tensor]
    ) -> None:
        self._checkpoint = checkpoint
        self._facts, self._prints = facts, prints
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._checkpoint.seconds

    def save(self, state: State) -> None:
        path = self._checkpoint.path
        tensors: dict[str, Tensor] = {}
        description = {
            "format": FORMAT,
            "facts": self._facts,
            "prints": _packed(self._prints, tensors),
            "state": _packed(state, tensors),
        }
        try:
            write(path, tensors, description)
        except OSError as error:
            warnings.warn(
                f"The checkpoint {path} could not be written ({error}). The run goes on, "
                "and what was written before is still there. Make room on the disk: the "
                f"next attempt is in {self._checkpoint.seconds:g} seconds.",
                RuntimeWarning,
                stacklevel=users_frame(),
            )
        self._last = time.monotonic()


def begun(
    checkpoint: Checkpoint | None,
    name: str,
    operators: Mapping[str, TorchLinearOperator | None],
    arguments: Mapping[str, Any],
    vectors: Mapping[str, Tensor | None],
) -> Run:
    """:meth:`Checkpoint.begin`, or a run that remembers nothing."""
    if checkpoint is None:
        return Run()
    return checkpoint.begin(name, operators, arguments, vectors)


def placed(state: State, device: torch.device) -> State:
    """Return a state with its tensors, also those in lists, on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(part) for part in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in state.items()}


def _read(path: str, facts: State, prints: dict[str, Tensor], tolerance: float) -> State:
    """Return the state in a file of the same call, for the same matrix."""
    tensors, description = read(path, torch.device("cpu"), FORMAT, _REMEDY)
    with as_described(path, _REMEDY):
        before = description["facts"]
        if before["run"] != facts["run"]:  # its arguments have other names
            before, facts = {"run": before["run"]}, {"run": facts["run"]}
        differences = [
            f"{name} is {facts.get(name)!r}, in the file {before.get(name)!r}"
            for name in {**facts, **before}
            if facts.get(name) != before.get(name)
        ]
        known = {} if differences else _unpacked(description["prints"], tensors)
        for name, here in prints.items():
            there = known.get(name)
            if differences:
                break
            if there is None or there.shape != here.shape:
                differences.append(f"{name} has another shape, or is not in the file")
            elif not (error := _distance(here, there)) <= tolerance:
                differences.append(f"{name} is another: it differs by {error:.1e}")
        differences += [f"{name} is in the file only" for name in known.keys() - prints]
        if differences:
            raise StoredFileError(
                f"{path} is the checkpoint of another run: {'; '.join(differences)}. "
                f"{_REMEDY}"
            )
        state: State = _unpacked(description["state"], tensors)
    return state


def _image(A: TorchLinearOperator, z: Tensor) -> Tensor:
    return A._product(z[: A.shape[1]].to(A.torch_dtype).unsqueeze(1))


def _fingerprint(block: Tensor, z: Tensor) -> Tensor:
    """Inner products of parts of columns with those of a random vector, on the host."""
    columns = block.unsqueeze(0) if block.ndim == 1 else block.T
    z = z[: len(block)]
    rows = []
    for column in columns:
        product = torch.view_as_real(column * z) if block.is_complex() else column * z
        parts = product.reshape(len(z), -1).tensor_split(_PARTS)
        rows.append(torch.stack([part.sum(dim=0) for part in parts]))
    return torch.stack(rows).cpu() if rows else torch.zeros(0, _PARTS, 1, device="cpu")


def _distance(here: Tensor, there: Tensor) -> float:
    """Largest difference of a column, relative to its length."""
    here, there = here.flatten(1), there.flatten(1)
    norms = torch.linalg.vector_norm(there, dim=1)
    errors = torch.linalg.vector_norm(here - there, dim=1)
    relative = errors / torch.where(norms > 0, norms, 1)
    return float(relative.max()) if len(relative) else 0.0


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return plain values, with names of tensors where there were some."""
    if isinstance(value, Mapping):
        return {"dict": {key: _packed(part, tensors) for key, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_packed(part, tensors) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    kind = "tensor" if isinstance(value, Tensor) else "array"
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    tensor = tensor.cpu().resolve_conj().contiguous()
    name = str(len(tensors))
    reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    places = {t.untyped_storage().data_ptr() for t in tensors.values()}
    shared = reals.untyped_storage().data_ptr() in places  # which safetensors refuses
    tensors[name] = reals.clone() if shared else reals
    return {kind: name, "complex": tensor.is_complex()}


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _unpacked(part, tensors) for key, part in value["dict"].items()}
    tensor = tensors[value["tensor" if "tensor" in value else "array"]]
    if value["complex"]:
        tensor = torch.view_as_complex(tensor)
    return tensor if "tensor" in value else tensor.numpy()
