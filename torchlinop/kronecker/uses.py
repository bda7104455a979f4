r"""How a parameter enters a model: what its gradients are made of.

A use is one call of a function with parameters, :math:`y = f(x; W, b)`, in a forward pass.
It has *positions* (samples, tokens, pixels) at which the same parameters act. The gradient
of a sample is a sum over its positions: of outer products :math:`g_t \otimes a_t` of an
output gradient and an input for matrices, of vectors for what scales and shifts.

Shapes here: ``S`` samples, ``T`` positions of a sample, ``K`` vectors that are pulled back
at once, ``G`` groups of a convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.kronecker.patches import Window
from torchlinop.kronecker.places import Place


class Use(ABC):
    """One call of a function with parameters.

    Attributes
    ----------
    weight, bias : int or None
        Which of the parameters they are.
    function : str
        Name of what was called.
    shape : tuple of int
        Of the output.
    edge : torch.autograd.graph.GradientEdge
        Where the gradient of the output is found.
    """

    weight: int | None
    bias: int | None
    function: str
    shape: torch.Size
    edge: Any
    #: in which groups of outputs and inputs the parameters connect
    groups = 1

    def record(self, function: str, output: Tensor) -> None:
        """Note the call's output, before anything happens to it."""
        self.function = function
        self.shape = output.shape
        # later changes in place do not move an edge
        self.edge = torch.autograd.graph.get_gradient_edge(output)

    @property
    @abstractmethod
    def positions(self) -> tuple[int, ...]:
        """Sizes of the output's dimensions at which the same parameters act."""

    @abstractmethod
    def positions_first(self, gradient: Tensor) -> Tensor:
        """Move what comes with the positions to the end: ``(K, *positions, *rest)``."""

    def output_gradients(self, gradient: Tensor, place: Place) -> Tensor:
        """Return output gradients ``(K, G, S, T, d)`` of one of the output's shape."""
        rows = place.rows(self.positions_first(gradient), 1)  # (K, S, T, d)
        if place.axis is None:  # one sample after the other
            rows = rows.reshape(-1, place.samples, *rows.shape[2:])
        return rows.unflatten(-1, (self.groups, -1)).permute(0, 3, 1, 2, 4)


class MatrixUse(Use):
    """A use whose gradient is a sum of outer products.

    Attributes
    ----------
    transposed : bool
        Whether the parameter has inputs as rows and outputs as columns.
    """

    transposed = False

    @abstractmethod
    def inputs(self, place: Place, samples: slice) -> Tensor:
        """Inputs ``(G, S, T, d)`` of some samples, or indices ``(1, S, T)``."""


class LinearUse(MatrixUse):
    """A matrix that is multiplied with vectors: ``F.linear``, ``x @ W``, ``W @ x``.

    Parameters
    ----------
    weight, bias
        Which parameters. Without a weight it is a shift.
    x
        Inputs, ``(*positions, d)``.
    transposed
        Whether the weight has inputs as rows.
    rows
        If only some rows of the parameters are used: the first, the last, and how many
        there are.
    columns
        Whether the output has the vectors as columns, ``(*positions[:-1], d, n)``.
    """

    def __init__(
        self,
        weight: int | None,
        bias: int | None,
        x: Tensor,
        *,
        transposed: bool = False,
        rows: tuple[int, int, int] | None = None,
        columns: bool = False,
    ) -> None:
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._x, self._rows, self._columns = x.detach(), rows, columns

    @property
    def positions(self) -> tuple[int, ...]:
        if self._columns:
            return (*self.shape[:-2], self.shape[-1])
        return tuple(self.shape[:-1])

    def positions_first(self, gradient: Tensor) -> Tensor:
        if self._columns:
            gradient = gradient.mT
        if self._rows is not None:
            first, last, count = self._rows
            gradient = F.pad(gradient, (first, count - last))
        return gradient

    def inputs(self, place: Place, samples: slice) -> Tensor:
        x = self._x.expand(*self.positions, self._x.shape[-1])
        return place.of(samples).rows(place.narrow(x, samples), 0).unsqueeze(0)


class EmbeddingUse(MatrixUse):
    """Rows of a matrix that are looked up; its inputs are unit vectors, given as indices.

    The rows of the padding index have no gradient: there the index is -1.
    """

    transposed = True

    def __init__(self, weight: int, index: Tensor, padding: int | None) -> None:
        self.weight, self.bias = weight, None
        self._index = index
        if padding is not None:
            self._index = index.masked_fill(index == padding, -1)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.shape[:-1])

    def positions_first(self, gradient: Tensor) -> Tensor:
        return gradient

    def inputs(self, place: Place, samples: slice) -> Tensor:
        part = place.narrow(self._index, samples)
        return place.of(samples).rows(part.unsqueeze(-1), 0).squeeze(-1).unsqueeze(0)


class ConvolutionUse(MatrixUse):
    """A convolution: a matrix that is multiplied with patches of the input.

    Parameters
    ----------
    weight, bias
        Which parameters.
    x
        Input, ``(N, channels, *space)`` or without ``N``.
    window
        How it is gone over.
    """

    def __init__(self, weight: int, bias: int | None, x: Tensor, window: Window) -> None:
        self.weight, self.bias, self.groups = weight, bias, window.groups
        self._x, self._window = x.detach(), window

    @property
    def _batched(self) -> bool:
        return len(self.shape) == len(self._window.kernel) + 2

    @property
    def positions(self) -> tuple[int, ...]:
        if self._batched:
            return (self.shape[0], *self.shape[2:])
        return tuple(self.shape[1:])

    def positions_first(self, gradient: Tensor) -> Tensor:
        return gradient.movedim(2 if self._batched else 1, -1)

    def inputs(self, place: Place, samples: slice) -> Tensor:
        in_space = place.axis is not None and (place.axis.dim > 0 or not self._batched)
        x = self._x if in_space else place.narrow(self._x, samples)
        patches = self._window.patches(x if self._batched else x.unsqueeze(0))
        if not self._batched:
            patches = patches.squeeze(0)
        part = place.of(samples)
        if in_space:
            patches = place.narrow(patches, samples)
        rows = part.rows(patches, 0)  # (S, T, G d)
        return rows.unflatten(-1, (self.groups, -1)).permute(2, 0, 1, 3)

    def slides(self, place: Place) -> bool:
        """Whether there is a shorter way to the inputs' second moment."""
        one_each = place.axis is not None and place.axis.dim == 0 and self._batched
        return one_each and len(self._x) == place.samples and self._window.slides(self._x)

    @property
    def entries_of_sample(self) -> int:
        """About how many numbers :meth:`moment` keeps for a sample."""
        width = torch.Size(self._window.kernel[1:]).numel()
        return self._x[0].numel() * width

    def moment(
        self, samples: slice, scales: Tensor | None, dtype: torch.dtype, *, ones: bool
    ) -> Tensor:
        """Return the sum of the inputs' outer products, ``(G, d, d)``.

        Parameters
        ----------
        samples
            Which samples.
        scales
            With which their inputs are multiplied, ``(S,)``.
        dtype
            In which is computed.
        ones
            Whether inputs have one more entry, which is 1.
        """
        return self._window.moment(self._x[samples].to(dtype), scales, ones=ones)


class VectorUse(Use):
    """A use whose gradient is elementwise: scale and shift of a normalization.

    Parameters
    ----------
    weight, bias
        Which parameters; either may be missing.
    standardized
        Makes what the scale is multiplied with, shaped like the output.
    channel
        The (only) dimension to which scale and shift belong, if not the last ones.
    dims
        How many last dimensions they belong to.
    """

    def __init__(
        self,
        weight: int | None,
        bias: int | None,
        standardized: Callable[[], Tensor],
        *,
        channel: int | None = None,
        dims: int = 1,
    ) -> None:
        self.weight, self.bias = weight, bias
        self._standardized = standardized
        self._channel, self._dims = channel, dims

    @property
    def positions(self) -> tuple[int, ...]:
        if self._channel is not None:
            return tuple(s for i, s in enumerate(self.shape) if i != self._channel)
        return tuple(self.shape[: len(self.shape) - self._dims])

    def positions_first(self, gradient: Tensor) -> Tensor:
        return (
            gradient if self._channel is None else gradient.movedim(1 + self._channel, -1)
        )

    def factors(self, place: Place) -> Tensor:
        """What the scale is multiplied with, ``(S, T, d)``."""
        with torch.no_grad():
            x = self._standardized().expand(self.shape)
        if self._channel is not None:
            x = x.movedim(self._channel, -1)
        return place.rows(x, 0)
