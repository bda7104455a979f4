"""Random vectors: the same ones for a seed on every device, however many at once."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import integer_seed, one_of

#: distributions with ``E[z z^T] = I``
Probes: TypeAlias = Literal["rademacher", "gaussian", "sphere"]
KINDS = ("rademacher", "gaussian", "sphere")

#: bytes of a block of vectors, and the most vectors in it
_BLOCK_BYTES, _BLOCK = 1 << 28, 64


class ProbeSource:
    r"""Draws vectors for an operator.

    Parameters
    ----------
    A
        The operator for whose dtype and device they are.
    kind
        ``"rademacher"``: random signs. ``"gaussian"``: normal. ``"sphere"``: uniform on the
        sphere of radius :math:`\sqrt N`.
    seed
        Of a generator of its own.
    size
        Length of the vectors; by default the number of columns.
    """

    def __init__(
        self, A: TorchLinearOperator, kind: str, seed: int, size: int | None = None
    ) -> None:
        self.kind = one_of("probes", kind, KINDS)
        self._size = A.shape[1] if size is None else size
        self._dtype, self._device = A.torch_dtype, A.device
        self._generator = torch.Generator("cpu").manual_seed(integer_seed(seed))

    @property
    def state(self) -> Tensor:
        """Of the generator: what was drawn so far."""
        return self._generator.get_state()

    def go_on(self, state: Tensor) -> None:
        """Draw what comes after a state."""
        self._generator.set_state(state)

    def rows(self, count: int) -> Tensor:
        """Draw ``(count, N)``; one by one, so that blocks do not change the numbers."""
        if self.kind == "rademacher":
            return self._signs(count)
        rows = torch.empty(count, self._size, dtype=self._dtype, device=self._device)
        for i in range(count):
            rows[i] = self._normal()
        return rows

    def _signs(self, count: int) -> Tensor:
        """Eight signs from each random byte, which is what goes to the device."""
        length = math.ceil(self._size / 8)
        drawn = [
            torch.randint(
                256, (length,), dtype=torch.uint8, generator=self._generator, device="cpu"
            )
            for _ in range(count)
        ]
        octets = torch.stack(drawn).to(self._device).unsqueeze(-1)
        places = torch.arange(8, dtype=torch.uint8, device=self._device)
        bits = (octets >> places).bitwise_and_(1).reshape(count, -1)[:, : self._size]
        return bits.to(self._dtype).mul_(2).sub_(1)

    def _normal(self) -> Tensor:
        wide = torch.promote_types(self._dtype, torch.float64)
        z = torch.randn(self._size, generator=self._generator, dtype=wide, device="cpu")
        if self.kind == "sphere":
            z *= math.sqrt(self._size) / torch.linalg.vector_norm(z)
        return z.to(self._device, self._dtype)


def block_size(A: TorchLinearOperator) -> int:
    """How many vectors to multiply at once."""
    row_bytes = max(A.shape) * torch.empty(0, dtype=A.torch_dtype, device="cpu").itemsize
    return max(1, min(_BLOCK, _BLOCK_BYTES // max(row_bytes, 1)))
