"""Checks of a user's model: a fixed, real, finite function of its parameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchlinop.autodiff.functional import scripted_modules
from torchlinop.autodiff.graphs import leaves_of
from torchlinop.data import RandomState


def mode_sensitive(model: Any) -> list[nn.Module]:
    """Modules that compute something else in training mode."""
    if not isinstance(model, nn.Module):
        return []
    kinds = (
        nn.modules.batchnorm._NormBase,
        nn.modules.dropout._DropoutNd,
        nn.RReLU,
        nn.RNNBase,
        nn.MultiheadAttention,
    )
    return [
        m
        for m in model.modules()
        if isinstance(m, kinds) or not type(m).__module__.startswith("torch.nn.")
    ]


def renormalizes(model: Any) -> bool:
    """Whether the model writes into its weights when it is evaluated."""
    return isinstance(model, nn.Module) and any(
        isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
        for m in model.modules()
    )


def require_evaluation_mode(model: Any) -> None:
    """Refuse modules that are random or couple the samples of a batch."""
    if not isinstance(model, nn.Module):
        return
    random_, coupled = [], []
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or not module.track_running_stats:
                coupled.append(label)
        elif module.training:
            dropout = getattr(module, "dropout", 0.0)
            if (
                (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
                or isinstance(module, nn.RReLU)
                or (isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and dropout > 0)
            ):
                random_.append(label)
    if random_:
        raise ValueError(
            f"In training mode the output is random because of {', '.join(random_)}; the "
            "curvature of a random function is not defined. Call model.eval() first."
        )
    if coupled:
        raise ValueError(
            f"Batch normalization with the statistics of the batch: "
            f"{', '.join(coupled)}. The loss is then no sum over samples. Call "
            "model.eval() (with track_running_stats=True), or pass "
            "check_deterministic=False if the data is one batch and this is meant."
        )


def require_replaceable(model: Any, params: dict[str, Tensor]) -> None:
    """Refuse parameters that TorchScript holds, since no others can take their place."""
    if not isinstance(model, nn.Module):
        return
    chosen = {id(p) for p in params.values()}
    for place, module in scripted_modules(model):
        for p in module.parameters():
            if id(p) in chosen:
                raise TypeError(
                    f"{place or 'The model'} is a TorchScript module, whose parameters "
                    "cannot be replaced and so not be differentiated twice. Pass the "
                    "module that it was scripted or traced from."
                )


def require_replaced(prediction: Tensor, params: Mapping[str, Tensor]) -> None:
    """Refuse a prediction that depends on the user's parameters, not on their leaves."""
    chosen = {id(p): name for name, p in params.items()}
    with torch._C.DisableTorchFunction():  # a mode would see every attribute that is read
        for leaf in leaves_of(prediction):
            if id(leaf) in chosen:
                raise ValueError(
                    f"The prediction depends on {chosen[id(leaf)]!r} on a way on which no "
                    "other tensor can take its place: by a tensor that was computed from "
                    "it before and is kept (an attribute, a buffer), or by an "
                    "autograd.Function that takes it from a global variable or an object "
                    "that is no module. Compute it in forward from the module's own "
                    "attribute; a function (params, X) has to use the params it is given."
                )


def require_real(value: Tensor, what: str) -> Tensor:
    """Refuse complex outputs."""
    with torch._C.DisableTorchFunction():  # a mode would see the question
        is_complex = value.is_complex()
    if is_complex:
        raise TypeError(
            f"{what} returned a complex tensor, for which these real matrices are not "
            "defined. Return torch.view_as_real(...) of it."
        )
    return value


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{bad} of {tensor.numel()} entries of {what} are NaN or infinite."
        )


# ---------------------------------------------------------------------- randomness

#: evaluations with other random numbers, where any are drawn
_DRAWS = 8
#: what kernels that are not deterministic may change, in units of rounding and at most
_NOISE = 100, 1e-2


def require_repeatable(
    evaluate: Callable[[], dict[str, Tensor]], device: torch.device, *, training: bool
) -> bool:
    """Evaluate twice, with different random numbers, and compare.

    To the bit, where the same random numbers give the same bits: a random branch may be
    scaled down to a millionth of the output. Where they do not, since kernels add up in an
    order of their own, by what rounding can make of it.

    Parameters
    ----------
    evaluate
        Returns results by name.
    device
        Whose random numbers are used, besides the host's.
    training
        Whether parts of the model are in training mode. Then random numbers that are drawn
        are an error also where they have changed nothing so far: a rare branch is dropped
        rarely.

    Returns
    -------
    bool
        Whether random numbers were drawn.
    """
    first, used = _drawn(evaluate, device, seed=1)
    for seed in range(2, 2 + (_DRAWS if used else 1)):
        second, _ = _drawn(evaluate, device, seed=seed)
        name = _difference(first, second)
        if name is not None:
            break
    else:
        if not (used and training):
            return used
        raise ValueError(
            "The model draws random numbers in training mode, even if they changed nothing "
            f"in {_DRAWS} evaluations of one batch. Call model.eval(), or pass "
            "check_deterministic=False."
        )
    again, _ = _drawn(evaluate, device, seed=1)
    if _difference(first, again) is not None and all(
        _close(first[key], second[key]) for key in first
    ):
        return used
    raise ValueError(
        f"The model or the loss is random: it gave two different {name} for the same "
        "batch, so there is no fixed curvature matrix. Turn off what is random in it "
        "(dropout, stochastic depth, noise; model.eval()), or pass "
        "check_deterministic=False."
    )


def _drawn(
    evaluate: Callable[[], dict[str, Tensor]], device: torch.device, *, seed: int
) -> tuple[dict[str, Tensor], bool]:
    """Evaluate with random numbers of one seed, and say whether any were used."""
    with RandomState(seed).in_force():
        before = _random_state(device)
        values = evaluate()
        return values, _random_state(device) != before


def _random_state(device: torch.device) -> tuple:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    bits = [state.numpy().tobytes() for state in states]
    numpy_state: Any = np.random.get_state()
    _, keys, *rest = numpy_state
    return (*bits, random.getstate(), keys.tobytes(), *rest)


def _difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> str | None:
    """Return the name of a result that differs in a bit."""
    for name, value in first.items():
        other = second[name]
        if value.shape != other.shape:
            return name
        if not ((value == other) | (value.isnan() & other.isnan())).all():
            return name
    return None


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    rtol = min(_NOISE[0] * torch.finfo(first.dtype).eps, _NOISE[1])
    scale = first.abs().max().item() if first.numel() else 0.0
    return torch.allclose(first, second, rtol=0, atol=rtol * scale, equal_nan=True)
