"""Kronecker-factored operators in files: tensors by safetensors, the rest as JSON.

Nothing in such a file is executed. What a matrix is made of is written down as a tree:
``{"kind": "kronecker", "factors": [...], ...}``, whose leaves are names of tensors.
"""

from __future__ import annotations

import json
import os
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
    try:
        blocks = [_read(part, tensors) for part in tree["blocks"]]
        groups = tuple(Group(tuple(n), tuple(i), rows) for n, i, rows in tree["groups"])
        layout = ParameterLayout(tuple(tree["sizes"]), groups)
        matrix = BlockDiagonalLinearOperator(blocks, layout)
    except (KeyError, TypeError, IndexError) as error:
        raise StoredFileError(
            f"{os.fspath(path)} does not hold what its description says: {error!r}."
        ) from error
    return matrix, tree


def _tree(path: Any, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise StoredFileError(
            f"{os.fspath(path)} is a safetensors file of something else: it was not "
            "written by save(path)."
        )
    tree: dict[str, Any] = json.loads(text)
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
        vectors = FactoredMatrix([tensors[name] for name in part["vectors"]])
        return EighLinearOperator(tensors[part["values"]], vectors)
    if kind != "kronecker":
        raise KeyError(kind)
    spectra = [
        Spectrum(
            tensors[s["values"]],
            None if s["vectors"] is None else tensors[s["vectors"]],
            s["smallest"],
            getattr(torch, s["precision"]),
        )
        for s in part["spectra"]
    ]
    factors = [tensors[name] for name in part["factors"]]
    return KroneckerLinearOperator.of_factors(factors, spectra or None)
