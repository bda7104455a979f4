"""Models whose parameters are spread over processes, evaluated with whole ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchlinop._spread import is_spread
from torchlinop.autodiff.functional import is_fully_sharded
from torchlinop.distributed.ranks import Ranks


class WholeTensors:
    """Whole tensors in the place of those of a model that are spread over processes.

    Parameters
    ----------
    model
        A module, or a function.
    params
        The parameters by name.
    ranks
        The processes that make up the operator.

    Raises
    ------
    TypeError, ValueError
        The model is spread in a way that cannot be undone.
    """

    def __init__(self, model: Any, params: Mapping[str, Tensor], ranks: Ranks) -> None:
        self._model = model
        self._params = params
        self._ranks = ranks
        #: by the identity of the spread ones, which are kept so that it is theirs alone
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}
        for name, tensor in self._spread().items():
            _require_gatherable(name, tensor, ranks)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the model as a whole."""
        return self._whole.get(id(tensor), (tensor, tensor))[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors behind, whose identities a copy does not share."""
        return {**vars(self), "_whole": {}}

    def gather(self) -> None:
        """Gather all tensors as they are now. Every process has to call this.

        They are gathered once for all batches: the graphs that are kept need them whole.
        """
        spread = self._spread()
        if not spread:
            return
        what = f"gathering the parameters of {type(self._model).__name__}"
        self._ranks.on_each(lambda: require_sharded(self._model), what)
        gathered = self._ranks.whole([*spread.values()], what)
        pairs = zip(spread.values(), gathered, strict=True)
        self._whole = {id(tensor): (tensor, its) for tensor, its in pairs}

    def _spread(self) -> dict[str, Tensor]:
        tensors = dict(self._params)
        if isinstance(self._model, nn.Module):
            tensors |= dict(self._model.named_parameters())
            tensors |= dict(self._model.named_buffers())
        return {name: tensor for name, tensor in tensors.items() if is_spread(tensor)}


def require_sharded(model: Any) -> None:
    """Refuse modules that are spread over processes in a way that cannot be undone.

    Raises
    ------
    TypeError
        Their activations are spread as well, or they are wrapped by FSDP 1.
    ValueError
        They are not sharded at the moment, or compute in another dtype than they have.
    """
    if not isinstance(model, nn.Module):
        return
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        where = f"{name or 'The model'} ({type(module).__name__})"
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise TypeError(
                f"{where} is wrapped by FullyShardedDataParallel, whose parameters are "
                "pieces of flat ones. Use torch.distributed.fsdp.fully_shard(model), whose "
                "parameters are whole to those who ask, or the module that was wrapped."
            )
        if any(map(_spreads_activations, _hooks(module))):
            raise TypeError(
                f"{where} has hooks of tensor parallelism (parallelize_module), by which "
                "its inputs or outputs are spread over the processes; derivatives are "
                "taken of whole ones. Build the operator of the model from before "
                "parallelize_module, or shard it by torch.distributed.fsdp.fully_shard."
            )
        if is_fully_sharded(module):
            _require_usual_fsdp(where, module)


def _require_usual_fsdp(where: str, module: nn.Module) -> None:
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    policy = state._mp_policy
    own = {p.dtype for p in module.parameters()}
    for dtype in (policy.param_dtype, policy.output_dtype):
        if dtype is not None and own - {dtype}:
            raise ValueError(
                f"{where} computes in {dtype} by its MixedPrecisionPolicy and has "
                f"parameters of {', '.join(map(str, own))}, in which derivatives "
                "are taken. Call fully_shard without mp_policy, or on model.to(dtype)."
            )
    # older versions of PyTorch have one group, or None
    groups = vars(state).get("_fsdp_param_groups") or [vars(state).get("_fsdp_param_group")]
    if any(group is not None and not group.is_sharded for group in groups):
        raise ValueError(
            f"{where} has whole parameters at the moment, which fully_shard frees before "
            "long: after an evaluation without a backward pass, for instance. Call "
            "reshard() of the model first."
        )


def _require_gatherable(name: str, tensor: Tensor, ranks: Ranks) -> None:
    """Refuse a tensor of which the processes of the operator do not have all parts."""
    spread: Any = tensor
    mesh = spread.device_mesh
    placed = f"Parameter {name!r} is a DTensor with the placements {spread.placements}"
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{placed} on a mesh that this process does not belong to. Build the operator "
            "on the processes of the mesh only."
        )
    if tensor.device.type != mesh.device_type:
        raise ValueError(
            f"{placed} on {mesh.device_type}, but its part is on {tensor.device} (by "
            "CPUOffloadPolicy, for instance), where it cannot be gathered. Call "
            "fully_shard without offload_policy."
        )
    mine = set(mesh.mesh.flatten().tolist())
    missing = sorted(mine - set(ranks.members))
    if missing and len(mine) > 1:
        given = "without process_group" if ranks.alone else "with a process_group"
        raise ValueError(
            f"{placed} on the processes {sorted(mine)}, all of which take part in every "
            f"product, but the operator was built {given} that lacks {missing}. Pass "
            "process_group=torch.distributed.group.WORLD, or mesh.get_group(), and to each "
            "process its share of the data."
        )


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _spreads_activations(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor.")
