"""Kronecker-factored operators in files: tensors by safetensors, the rest as JSON.

Nothing in such a file is executed. What a matrix is made of is written down as a tree:
``{"kind": "kronecker", "factors": [...], ...}``, whose leaves are names of tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchlinop.kronecker.layout import Group, ParameterLayout
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EighLinearOperator,
    FactoredMatrix,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    Spectrum,
    StructuredLinearOperator,
)

#: of the files written here; files of other versions are refused
FORMAT = "torchlinop-kronecker-1"
_KEY = "torchlinop"


class StoredFileError(ValueError):
    """A file is truncated, foreign, or of a model that is not the given one."""


def save_matrix(
    path: str | os.PathLike[str], matrix: BlockDiagonalLinearOperator, facts: dict[str, Any]
) -> None:
    """Write a matrix with what is known about it.

    Parameters
    ----------
    path
        File to write; an existing one is replaced at the end, at once.
    matrix
        Of structured blocks on parameters.
    facts
        Plain values, for JSON.
    """
    save_file = _safetensors().save_file
    tensors: dict[str, Tensor] = {}
    layout = matrix.layout
    assert isinstance(layout, ParameterLayout)
    tree = {
        "format": FORMAT,
        "sizes": list(layout.sizes),
        "groups": [[list(g.names), list(g.indices), g.rows] for g in layout.groups],
        "blocks": [_written(block, tensors) for block in matrix.blocks],
        **facts,
    }
    partial = f"{os.fspath(path)}.partial"
    try:
        save_file(tensors, partial, metadata={_KEY: json.dumps(tree)})
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_matrix(
    path: str | os.PathLike[str], device: torch.device
) -> tuple[BlockDiagonalLinearOperator, dict[str, Any]]:
    """Read what :func:`save_matrix` wrote.

    Raises
    ------
    StoredFileError
        The file is truncated, or was not written here.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), "pt", device=str(device)) as file:
            tree = _tree(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except safetensors.SafetensorError as error:
        raise StoredFileError(
            f"{os.fspath(path)} is no safetensors file, or is truncated ({error}). Write "
            "it again with save(path)."
        ) from error
    with as_described(path):
        blocks = [_read(part, tensors) for part in tree["blocks"]]
        groups = tuple(Group(tuple(n), tuple(i), rows) for n, i, rows in tree["groups"])
        layout = ParameterLayout(tuple(tree["sizes"]), groups)
        matrix = BlockDiagonalLinearOperator(blocks, layout)
        _require_sizes(matrix, layout)
    return matrix, tree


@contextmanager
def as_described(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make errors of what a file says about its tensors errors of the file."""
    try:
        yield
    except StoredFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoredFileError(
            f"{os.fspath(path)} does not hold what its description says: {error!r}. "
            "Compute and save it again."
        ) from error


def _require_sizes(matrix: BlockDiagonalLinearOperator, layout: ParameterLayout) -> None:
    """Refuse blocks that have not the sizes of their parameters."""
    indices = sorted(i for group in layout.groups for i in group.indices)
    if indices != list(range(len(layout.sizes))):
        raise ValueError(f"the blocks have the parameters {indices} of {layout.sizes}")
    for group, block in zip(layout.groups, matrix.blocks, strict=True):
        sizes = [layout.sizes[i] for i in group.indices]
        if block.shape[0] != sum(sizes):
            raise ValueError(
                f"the block of {', '.join(group.names)} has shape {block.shape}, its "
                f"parameters have {sum(sizes)} entries"
            )
        if group.rows is not None and any(size % group.rows for size in sizes):
            raise ValueError(f"{sizes} entries of matrices with {group.rows} rows")


def _tree(path: Any, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise StoredFileError(
            f"{os.fspath(path)} is a safetensors file of something else: it was not "
            "written by save(path)."
        )
    with as_described(path):
        tree: dict[str, Any] = dict(json.loads(text))
    if tree.get("format") != FORMAT:
        raise StoredFileError(
            f"{os.fspath(path)} has the format {tree.get('format')!r}, this version of "
            f"torchlinop reads {FORMAT!r}. Compute and save it again."
        )
    return tree


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files of factors need safetensors: pip install safetensors."
        ) from error

    class Functions:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)
        SafetensorError = safetensors.SafetensorError

    return Functions


def _put(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor.detach().contiguous().clone()
    return name


def _written(block: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(block, BlockDiagonalLinearOperator):
        return {"kind": "blocks", "blocks": [_written(b, tensors) for b in block.blocks]}
    if isinstance(block, DiagonalLinearOperator):
        return {"kind": "diagonal", "entries": _put(block.diagonal(), tensors)}
    if isinstance(block, EighLinearOperator):
        vectors = block.eigenvectors
        assert isinstance(vectors, FactoredMatrix)
        return {
            "kind": "eigh",
            "values": _put(block.eigenvalues(), tensors),
            "vectors": [_put(factor, tensors) for factor in vectors.factors],
        }
    if isinstance(block, LowRankPlusDiagonalLinearOperator):
        return {"kind": "low rank", "parts": [_put(part, tensors) for part in block.parts]}
    assert isinstance(block, KroneckerLinearOperator)
    return {
        "kind": "kronecker",
        "factors": [_put(factor, tensors) for factor in block.factors],
        "spectra": [
            {
                "values": _put(s.values, tensors),
                "vectors": None if s.vectors is None else _put(s.vectors, tensors),
                "smallest": s.smallest,
                "precision": str(s.precision).removeprefix("torch."),
            }
            for s in block.known_spectra() or ()
        ],
    }


def _read(part: dict[str, Any], tensors: dict[str, Tensor]) -> StructuredLinearOperator:
    kind = part["kind"]
    if kind == "blocks":
        return BlockDiagonalLinearOperator([_read(p, tensors) for p in part["blocks"]])
    if kind == "diagonal":
        return DiagonalLinearOperator(tensors[part["entries"]])
    if kind == "eigh":
        vectors = FactoredMatrix([_square(tensors[name]) for name in part["vectors"]])
        return EighLinearOperator(tensors[part["values"]], vectors)
    if kind == "low rank":
        return LowRankPlusDiagonalLinearOperator(*(tensors[n] for n in part["parts"]))
    if kind != "kronecker":
        raise KeyError(kind)
    factors = [_square(tensors[name]) for name in part["factors"]]
    spectra = [_spectrum(s, tensors) for s in part["spectra"]]
    if spectra and [s.values.shape for s in spectra] != [f.shape[:1] for f in factors]:
        raise ValueError("decompositions of other factors")
    return KroneckerLinearOperator.of_factors(factors, spectra or None)


def _spectrum(part: dict[str, Any], tensors: dict[str, Tensor]) -> Spectrum:
    values, name = tensors[part["values"]], part["vectors"]
    vectors = None if name is None else _square(tensors[name])
    if vectors is not None and vectors.shape != (len(values), len(values)):
        raise ValueError(f"{len(values)} eigenvalues, vectors {tuple(vectors.shape)}")
    precision = getattr(torch, part["precision"])
    return Spectrum(values, vectors, float(part["smallest"]), precision)


def _square(factor: Tensor) -> Tensor:
    """Return a square matrix, or a diagonal one by its entries."""
    if factor.ndim not in (1, 2) or factor.shape[0] != factor.shape[-1]:
        raise ValueError(f"a factor of shape {tuple(factor.shape)} is not square")
    return factor
