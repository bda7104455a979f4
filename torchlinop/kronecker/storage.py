"""Kronecker-factored operators in files: tensors by safetensors, the rest as JSON.

Nothing in such a file is executed. What a matrix is made of is written down as a tree:
``{"kind": "kronecker", "factors": [...], ...}``, whose leaves are names of tensors.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from torchlinop._files import as_described, read, write
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
#: what to do about a file that is none
REMEDY = "Compute the factors and write them with save(path)."


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
    write(path, tensors, tree)


def load_matrix(
    path: str | os.PathLike[str], device: torch.device
) -> tuple[BlockDiagonalLinearOperator, dict[str, Any]]:
    """Read what :func:`save_matrix` wrote.

    Raises
    ------
    StoredFileError
        The file is truncated, or was not written here.
    """
    tensors, tree = read(path, device, FORMAT, REMEDY)
    with as_described(path, REMEDY):
        blocks = [_read(part, tensors) for part in tree["blocks"]]
        groups = tuple(Group(tuple(n), tuple(i), rows) for n, i, rows in tree["groups"])
        layout = ParameterLayout(tuple(tree["sizes"]), groups)
        matrix = BlockDiagonalLinearOperator(blocks, layout)
        _require_sizes(matrix, layout)
    return matrix, tree


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
