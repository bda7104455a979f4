"""Spectral densities of the diagonal blocks of a curvature matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from torchlinop._checkpoint import Checkpoint, State, begun
from torchlinop._space import ParameterSpace
from torchlinop.estimate.arguments import square_operator
from torchlinop.estimate.densities import SpectralDensity, density_of
from torchlinop.estimate.probes import Probes, ProbeSource
from torchlinop.structured import SubmatrixLinearOperator


def layer_densities(
    A: Any,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    space: ParameterSpace | None = None,
    num_probes: int = 10,
    num_steps: int = 100,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> dict[str, SpectralDensity]:
    """Spectral density of each layer's own block of a curvature matrix.

    Parameters
    ----------
    A
        Symmetric operator with a parameter space (Hessian, GGN, Fisher), shape ``(N, N)``.
    groups
        Names of parameters by the name of their group. By default one group for each
        module that has parameters: weight and bias of a layer are together.
    space
        The parameter space, for operators without one, such as sums.
    num_probes, num_steps, probes, seed, progress, checkpoint
        As for :func:`spectral_density`; at most as many steps as a block has
        rows. One more product with all of ``A`` tells what rounding errors may be.

    Returns
    -------
    dict of SpectralDensity
        By the name of the group, in the order of the parameters.

    Raises
    ------
    TypeError
        ``A`` has no parameter space and none is given, or a group is a string.
    KeyError
        A group names a parameter that the space has not.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import GGNLinearOperator, estimate
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> data = [(torch.rand(8, 4), torch.rand(8, 2))]
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    >>> {name: p.dim for name, p in estimate.layer_densities(G).items()}
    {'0': 15, '1': 8}
    """
    A = square_operator(A, "layer_densities")
    space = getattr(A, "space", None) if space is None else space
    if not isinstance(space, ParameterSpace):
        raise TypeError(
            f"{A!r} has no parameter space. Pass space=, for instance that of the Hessian "
            "in a sum, or take spectral_density of SubmatrixLinearOperator(A, rows, rows)."
        )
    if space.dim != A.shape[0]:
        raise ValueError(
            f"The parameter space has {space.dim} entries, the operator {A.shape[0]} rows."
        )
    if groups is None:
        modules: dict[str, list[str]] = {}
        for name in space.names:
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
        groups = modules
    for group, names in groups.items():
        if isinstance(names, str):
            raise TypeError(
                f"groups[{group!r}] has to be a list of parameters, got the string "
                f"{names!r}. Write [{names!r}]."
            )
    stops = dict(zip(space.names, accumulate(space.sizes), strict=True))
    sizes = dict(zip(space.names, space.sizes, strict=True))
    unknown = [name for names in groups.values() for name in names if name not in sizes]
    if unknown:
        raise KeyError(f"{unknown} are no parameters. There are {list(space.names)}.")
    arguments = {
        "groups": [list(names) for names in groups.values()],
        "num_probes": num_probes,
        "num_steps": num_steps,
        "probes": probes,
        "seed": seed,
    }
    run = begun(Checkpoint.of(checkpoint), "layer_densities", {"A": A}, arguments, {})
    state = run.state or {"finished": [], "current": None}
    finished, current = state["finished"], state["current"]

    def whole(part: State) -> State:
        return {"finished": finished, "current": part}

    # a block may be zero but for rounding, as that of the bias of an attention's keys
    z = ProbeSource(A, "rademacher", seed).rows(1).T
    norm = torch.linalg.vector_norm(A._product(z)).item() / math.sqrt(A.shape[0])
    densities: dict[str, SpectralDensity] = {}
    for place, (group, names) in enumerate(groups.items()):
        if place < len(finished):
            densities[group] = SpectralDensity(**finished[place])
            continue
        rows = [i for name in names for i in range(stops[name] - sizes[name], stops[name])]
        block = square_operator(SubmatrixLinearOperator(A, rows, rows), "layer_densities")
        part, current = run.part(current, whole), None
        densities[group] = density_of(
            block, num_probes, num_steps, probes, seed, progress, norm, part
        )
        finished.append(vars(densities[group]))
    return densities
