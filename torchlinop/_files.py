"""Tensors in files: safetensors, with what they are described by as JSON inside.

Nothing in such a file is executed. A file is whole or not there: it is written beside its
place, brought to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEY = "torchlinop"


class StoredFileError(ValueError):
    """A file is truncated, foreign, or of something else than what is asked for."""


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: dict[str, Any]
) -> None:
    """Write tensors and a description; an existing file is replaced at the end, at once.

    Parameters
    ----------
    tensors
        Contiguous, of which no two share memory.
    description
        Plain values, for JSON; ``"format"`` is what :func:`read` asks for.

    Raises
    ------
    OSError
        The file could not be written; what was there before still is.
    """
    library = safetensors()
    # safetensors may write to a file of another name first: a killed one leaves a folder
    folder = f"{os.fspath(path)}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder)
    partial = os.path.join(folder, "file")
    try:
        library.save_file(dict(tensors), partial, {_KEY: json.dumps(description)})
        _to_disk(partial)
        os.replace(partial, path)
        if os.name == "posix":
            _to_disk(os.path.dirname(os.path.abspath(path)))
    except library.SafetensorError as error:  # which is no OSError
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read(
    path: str | os.PathLike[str], device: torch.device, form: str, remedy: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write` wrote.

    Parameters
    ----------
    form
        What the description has to have as ``"format"``.
    remedy
        What to do about a file that is none, a sentence.

    Raises
    ------
    StoredFileError
        The file is truncated, or was not written here.
    """
    library = safetensors()
    try:
        # by way of the host: safetensors knows a few devices only
        with library.safe_open(os.fspath(path), "pt", device="cpu") as file:
            description = _described(path, file.metadata(), form, remedy)
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).to(device) for name in names}
    except library.SafetensorError as error:
        raise StoredFileError(
            f"{os.fspath(path)} is no safetensors file, or is truncated ({error}). {remedy}"
        ) from error
    return tensors, description


@contextmanager
def as_described(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Make errors of what a file says about its tensors errors of the file."""
    try:
        yield
    except StoredFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoredFileError(
            f"{os.fspath(path)} does not hold what its description says: "
            f"{error!r}. {remedy}"
        ) from error


def safetensors() -> Any:
    """Import what is optional.

    Raises
    ------
    ImportError
        safetensors is not installed.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files of tensors need safetensors: pip install safetensors."
        ) from error

    class Functions:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)
        SafetensorError = safetensors.SafetensorError

    return Functions


def _described(
    path: Any, metadata: dict[str, str] | None, form: str, remedy: str
) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise StoredFileError(
            f"{os.fspath(path)} is a safetensors file of something else, not of "
            f"torchlinop. {remedy}"
        )
    with as_described(path, remedy):
        description: dict[str, Any] = dict(json.loads(text))
    if description.get("format") != form:
        raise StoredFileError(
            f"{os.fspath(path)} has the format {description.get('format')!r}, wanted is "
            f"{form!r}. {remedy}"
        )
    return description


def _to_disk(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
