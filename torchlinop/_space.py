"""The space a curvature matrix acts on: flat vectors and named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten

from torchlinop._spread import is_spread, whole
from torchlinop._typing import Parameters

#: parameter dtypes whose vectors are exchanged in another dtype, since NumPy has none
_PRESENTED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class ParameterSpace:
    """Names, shapes, dtype and device of a list of tensors.

    Parameters
    ----------
    tensors
        The parameters by name, in the order in which a flat vector holds them.

    Attributes
    ----------
    names : tuple of str
    shapes : tuple of torch.Size
    dim : int
        Number of entries of a flat vector.
    dtype : torch.dtype
        Of flat vectors: that of the parameters, float32 for half-precision ones.
    device : torch.device

    Examples
    --------
    >>> import torch
    >>> space = ParameterSpace({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    >>> space.dim
    8
    >>> named = space.to_named(torch.arange(8.0))
    >>> named["bias"]
    tensor([6., 7.])
    >>> space.to_vector(named)
    tensor([0., 1., 2., 3., 4., 5., 6., 7.])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError("params is empty: there is nothing to differentiate.")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"params has to hold tensors, got {type(tensor).__name__} for {name!r}."
                )
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"Parameter {name!r} has no shape yet. Call the model once, so that "
                    "its lazy modules make their parameters."
                )
            if tensor.is_inference():
                raise ValueError(
                    f"Parameter {name!r} was made in inference mode and cannot be "
                    "differentiated. Build the model outside torch.inference_mode()."
                )
            if not tensor.is_floating_point():
                raise TypeError(
                    f"Parameter {name!r} has dtype {tensor.dtype}; derivatives need a "
                    "real floating-point dtype."
                )
        self.device = _only("device", tensors)
        self.parameter_dtype = _only("dtype", tensors)
        self.dtype = _PRESENTED.get(self.parameter_dtype, self.parameter_dtype)
        self.names = tuple(tensors)
        self.shapes = tuple(t.shape for t in tensors.values())
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.dim = sum(self.sizes)
        self._pairs = [i for i, s in enumerate(self.shapes) if s[-1:] == (2,)]
        self._needs_cast = self.dtype != self.parameter_dtype

    def split(self, v: Tensor) -> list[Tensor]:
        """Views of a flat ``(dim,)`` or ``(K, dim)`` tensor, shaped like the parameters."""
        if self._needs_cast:
            v = v.to(self.parameter_dtype)
        if v.ndim == 1:
            pieces = zip(v.split_with_sizes(self.sizes), self.shapes, strict=True)
            parts = [p if len(s) == 1 else p.reshape(s) for p, s in pieces]
        else:
            k = v.shape[0]
            blocks = v.split(self.sizes, dim=1)
            parts = [b.reshape(k, *s) for b, s in zip(blocks, self.shapes, strict=True)]
        for i in self._pairs:  # that may be seen as complex numbers
            parts[i] = aligned(parts[i])
        return parts

    def join(self, tensors: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        """Inverse of :meth:`split`: a fresh ``(dim,)`` or ``(K, dim)`` tensor."""
        if batched:
            flat = torch.cat([t.reshape(t.shape[0], -1) for t in tensors], dim=1)
        else:
            flat = flatten(tensors)
            if len(tensors) == 1:  # the only case that is not copied
                flat = flat.clone()
        return flat.to(self.dtype) if self._needs_cast else flat

    def to_named(self, vector: Tensor) -> dict[str, Tensor]:
        """Turn a flat vector ``(dim,)`` into tensors by parameter name.

        They are whole, also those of a ``DTensor``, of which every process calls this.
        """
        if tuple(vector.shape) != (self.dim,):
            raise ValueError(
                f"Expected a vector of shape ({self.dim},), got {tuple(vector.shape)}."
            )
        vector = whole(vector) if is_spread(vector) else vector
        return dict(zip(self.names, self.split(vector), strict=True))

    def to_vector(self, tensors: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
        """Turn tensors, by name or in order, into a flat vector ``(dim,)``.

        It is whole, also that of a list of ``DTensor``, for which every process calls this.
        """
        if isinstance(tensors, Mapping):
            missing = [n for n in self.names if n not in tensors]
            unknown = [n for n in tensors if n not in self.names]
            if missing or unknown:
                raise KeyError(
                    f"Expected one tensor for each of {list(self.names)}; missing "
                    f"{missing}, unknown {unknown}."
                )
            tensors = [tensors[n] for n in self.names]
        listed = list(tensors)
        shapes = tuple(t.shape for t in listed)
        if shapes != self.shapes:
            raise ValueError(
                f"Expected tensors of shapes {[tuple(s) for s in self.shapes]}, got "
                f"{[tuple(s) for s in shapes]}."
            )
        return self.join([whole(t) if is_spread(t) else t.detach() for t in listed])

    def __repr__(self) -> str:
        return (
            f"ParameterSpace(dim={self.dim}, tensors={len(self.names)}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def aligned(x: Tensor) -> Tensor:
    """Return a tensor with pairs in its last dimension such that they can be complex.

    ``torch.view_as_complex`` refuses those that begin at an odd place.
    """
    odd = x.storage_offset() % 2 or any(s % 2 for s in x.stride()[:-1])
    return x.clone(memory_format=torch.contiguous_format) if odd else x


def _only(attribute: str, tensors: Mapping[str, Tensor]) -> Any:
    """Return the one value of an attribute that all tensors share."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(getattr(tensor, attribute), []).append(name)
    if len(groups) > 1:
        listing = "; ".join(f"{value}: {names}" for value, names in groups.items())
        raise ValueError(
            f"All parameters have to share one {attribute}, got {listing}. "
            f"Convert the model first (model.to(...)), or pass a subset of params."
        )
    return next(iter(groups))


def named_parameters(model: object, params: Parameters) -> dict[str, Tensor]:
    """Give every parameter its name in the model, and refuse what is not part of it.

    Parameters
    ----------
    model
        A module, or any callable (whose parameters are then numbered).
    params
        Tensors in a list, or by name.

    Raises
    ------
    TypeError
        ``params`` is neither a list nor a dict of tensors.
    ValueError
        A tensor is not a parameter of the module, or is listed twice.
    KeyError
        A name is not a parameter of the module.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params has to be a list of tensors or a dict of tensors by name, got "
            f"{type(params).__name__}. For one tensor write [tensor]."
        )
    if not isinstance(model, nn.Module):
        if isinstance(params, Mapping):
            return dict(params)
        return {str(i): p for i, p in enumerate(params)}

    own = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(params, Mapping):
        for name, tensor in params.items():
            if name not in own:
                raise KeyError(
                    f"{name!r} is not a parameter of {type(model).__name__}. It has: "
                    f"{', '.join(own)}."
                )
            if own[name] is not tensor:
                raise ValueError(
                    f"The tensor given for {name!r} is not the model's own "
                    f"(shape {tuple(own[name].shape)}). Pass the model's parameter, "
                    "from dict(model.named_parameters()), and copy new values into it."
                )
        first: dict[int, str] = {}
        for name, tensor in params.items():
            if first.setdefault(id(tensor), name) != name:
                raise ValueError(
                    f"params lists one parameter twice, as {first[id(tensor)]!r} and as "
                    f"{name!r}. List each parameter once; tied weights are one parameter."
                )
        return dict(params)

    by_identity: dict[int, str] = {}
    for name, tensor in own.items():
        by_identity.setdefault(id(tensor), name)
    named: dict[str, Tensor] = {}
    for i, tensor in enumerate(params):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"params has to hold tensors, entry {i} is {type(tensor).__name__}."
                + (
                    " For named_parameters() write dict(model.named_parameters())."
                    if isinstance(tensor, tuple)
                    else ""
                )
            )
        found = by_identity.get(id(tensor))
        if found is None:
            raise ValueError(
                f"params[{i}], of shape {tuple(tensor.shape)}, is not a parameter of "
                f"{type(model).__name__}. Pass tensors from model.parameters(); a copy "
                "or a view of one is another tensor."
            )
        if found in named:
            raise ValueError(
                f"params lists {found!r} twice (at position {i} again). List each "
                "parameter once; tied weights are one parameter."
            )
        named[found] = tensor
    return named
