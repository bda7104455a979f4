"""Patches of images: what each output of a convolution sees, and their second moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution goes over its input; one entry for each dimension of space.

    Attributes
    ----------
    kernel, stride, dilation : sequence of int
    padding : sequence of pairs of int
    groups : int
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]
    groups: int

    def patches(self, x: Tensor) -> Tensor:
        """Return ``(N, *space, G * channels / G * kernel)`` of ``(N, channels, ...)``."""
        n = len(self.kernel)
        x = self._unfolded(x, 0)  # (N, channels, *space, *kernel)
        # copied with space last, where memory is in order
        space, kernel = range(2, 2 + n), range(2 + n, 2 + 2 * n)
        columns = x.permute(1, *kernel, 0, *space).flatten(0, n)
        return columns.movedim(0, -1)

    def slides(self, x: Tensor) -> bool:
        """Whether :meth:`moment` is possible: patches overlap, row by row of space."""
        height = x.shape[2] + sum(self.padding[0])
        reach = self.dilation[0] * (self.kernel[0] - 1)
        return self.stride[0] == 1 and self.kernel[0] > 1 and height > 2 * reach

    def moment(self, x: Tensor, scales: Tensor | None, *, ones: bool) -> Tensor:
        r"""Return the sum of outer products of all patches, ``(G, d, d)``.

        Row ``r`` of space is in the patches of several rows of outputs, at another row
        ``k`` of the kernel each time. With :math:`U_r` of what the other dimensions make
        of it, the part of rows ``k`` and ``l`` is :math:`\sum_r U_{r+k}^\top U_{r+l}`, a
        sum that depends on ``l - k`` but for its first and last terms. So it is computed
        once for each difference: for 3 x 3 kernels a third of the work.

        Parameters
        ----------
        x
            Of shape ``(N, channels, *space)``.
        scales
            With which the patches of each sample are multiplied, ``(N,)``.
        ones
            Whether patches have one more entry, which is 1.
        """
        U = self._lines(x)  # (G, N, height, width, m)
        m = U.shape[-1]
        if ones:
            U = torch.cat([U, U.new_ones(1).expand(*U.shape[:-1], 1)], dim=-1)
        if scales is not None:
            U = U * scales.view(1, -1, 1, 1, 1)
        U = U.transpose(1, 2).contiguous().flatten(2, 3)
        K, step = self.kernel[0], self.dilation[0]
        height = U.shape[1] - step * (K - 1)

        def product(start: int, stop: int, shift: int) -> Tensor:
            left = U[:, start:stop].flatten(1, 2)
            right = U[:, start + shift : stop + shift].flatten(1, 2)
            return torch.bmm(left.mT, right)

        # upper triangle, in the order of rows of the kernel, channels, columns
        whole = U.new_zeros(len(U), K * m + ones, K * m + ones)
        for difference in range(K):
            shift, last = step * difference, step * (K - 1 - difference)
            common = product(last, height, shift)
            for k in range(K - difference):
                first = step * k
                part = common + product(first, last, shift)
                part += product(height, height + first, shift)
                left, right = k * m, (k + difference) * m
                whole[:, left : left + m, right : right + m] = part[:, :m, :m]
                if ones and not difference:
                    whole[:, left : left + m, -1] = part[:, :m, -1]
                    whole[:, -1, -1] = part[:, -1, -1]
        whole = whole.triu() + whole.triu(1).mT
        order = torch.arange(K * m + ones, device=x.device)
        channels = x.shape[1] // self.groups
        order[: K * m] = order[: K * m].view(K, channels, -1).transpose(0, 1).flatten()
        return whole[:, order][:, :, order]

    def _lines(self, x: Tensor) -> Tensor:
        """Unfold all dimensions of space but the first."""
        n = len(self.kernel)
        x = self._unfolded(x, 1).unflatten(1, (self.groups, -1))
        # (N, G, channels, height, *space, *kernel)
        space, kernel = range(4, 3 + n), range(3 + n, 2 + 2 * n)
        lines = x.permute(1, 0, 3, *space, 2, *kernel)
        return lines.flatten(2 + n).flatten(3, 1 + n) if n > 1 else lines.unsqueeze(3)

    def _unfolded(self, x: Tensor, first: int) -> Tensor:
        """Pad, and add to each dimension of space from ``first`` on one of the kernel."""
        pads = [size for pair in reversed(self.padding) for size in pair]
        if any(pads):
            x = F.pad(x, pads)
        for i in range(first, len(self.kernel)):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            x = x.unfold(2 + i, reach, self.stride[i])[..., :: self.dilation[i]]
        return x
