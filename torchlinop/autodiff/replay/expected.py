"""Whether the time that a replay is likely to save is more than recording it takes."""

from __future__ import annotations

#: seconds per node of a graph: what recording it takes, what a replay saves each time
_RECORDING, _ENGINE = 60e-6, 2.5e-6
#: share of a product that a replay saves beside that, by fewer kernels
_KERNELS = 0.04
#: share of a product below which the engine's part is nothing, and large tensors are all:
#: while recording torch adds them up in new memory
_LITTLE = 0.005


def pays(nodes: int, seconds: float, products: int) -> bool:
    """Whether a product should be recorded.

    Parameters
    ----------
    nodes
        Of the graph.
    seconds
        What a product takes.
    products
        How many are expected to come.
    """
    engine = nodes * _ENGINE
    gain = engine + _KERNELS * seconds
    cost = nodes * _RECORDING + 2 * seconds
    return engine >= _LITTLE * seconds and gain * products > cost
