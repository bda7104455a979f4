"""That library's arguments as an empirical risk of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torchlinop import EmpiricalRisk
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.functional import with_tensors
from torchlinop.data.seeds import seeded_pass

#: that library's default seed
SEED = 2147483647
#: number of samples in an input
BatchSize = Callable[[Any], int]


def as_options(
    data: Data,
    progressbar: bool = False,
    check_deterministic: bool = True,
    num_data: int | None = None,
    batch_size_fn: BatchSize | None = None,
) -> dict[str, Any]:
    """Translate the options; compare the number of samples claimed with the data.

    Raises
    ------
    ValueError
        The data holds another number of samples.
    """
    if num_data is not None:
        count = batch_size_fn or (lambda X: int(X.shape[0]))
        found = sum(count(X) for X, _ in seeded_pass(data, 0))
        if found != num_data:
            raise ValueError(f"num_data={num_data}, but the data holds {found} samples.")
    return {
        "progressbar": progressbar,
        "check_deterministic": check_deterministic,
        "batch_size": batch_size_fn,
    }


def as_risk(
    model: Model, loss_func: Loss, params: Parameters, data: Data, *options: Any
) -> EmpiricalRisk:
    """Return the risk of these arguments; the options are those of :func:`as_options`."""
    translated = as_options(data, *options)
    return EmpiricalRisk(located(model, params), loss_func, params, data, **translated)


def located(model: Model, params: Parameters) -> Model:
    """Return a model in which the tensors of a dict take the places of its parameters.

    The same model, if they are its own. Otherwise a copy of its structure, which shares all
    other tensors with it. So changes of tensors, in place, are noticed, but not those of
    other attributes of the model (training mode, hooks).

    Raises
    ------
    ValueError
        A tensor has another shape than the parameter, or one parameter has two values.
    """
    if not isinstance(model, nn.Module) or not isinstance(params, Mapping):
        return model
    own = dict(model.named_parameters(remove_duplicate=False))
    given: dict[int, Tensor] = {}
    for name, tensor in params.items():
        if name not in own or not isinstance(tensor, Tensor):
            continue  # said later
        if tensor is not own[name] and tensor.shape != own[name].shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, but the parameter has "
                f"{tuple(own[name].shape)}."
            )
        if given.setdefault(id(own[name]), tensor) is not tensor:
            raise ValueError(
                f"params has two values for one parameter, which is tied; {name!r} is the "
                "second. Give one of its names."
            )
    elsewhere = {k: t for k, t in given.items() if k != id(t)}
    if not elsewhere:
        return model
    copied, alive = with_tensors(model, elsewhere)
    vars(copied)["_referred_to"] = alive  # by weak references
    return copied
