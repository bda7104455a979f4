"""Type aliases shared by every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

#: A dense array of any library that speaks DLPack, or anything NumPy can read.
Array: TypeAlias = Any
#: A number: Python, NumPy, or a 0-dimensional array.
Scalar: TypeAlias = Any
#: What the parameters may be given as.
Parameters: TypeAlias = Iterable[Tensor] | Mapping[str, Tensor]
#: A module, or a function of (parameters, input).
Model: TypeAlias = nn.Module | Callable[[Any, Any], Tensor]
#: A loss module or a function of (prediction, target).
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: Any re-iterable of (input, target).
Data: TypeAlias = Iterable[tuple[Any, Any]]
Reduction: TypeAlias = Literal["mean", "sum"]
#: ``"auto"`` keeps linearizations while they fit the memory budget.
CachePolicy: TypeAlias = Literal["auto"] | bool
