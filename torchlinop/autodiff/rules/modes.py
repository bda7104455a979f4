"""Contexts in which the rules apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import torchlinop.autodiff.rules.attention as attention
import torchlinop.autodiff.rules.control_flow as control_flow
import torchlinop.autodiff.rules.convolutions as convolutions
import torchlinop.autodiff.rules.embeddings as embeddings
import torchlinop.autodiff.rules.losses as losses
import torchlinop.autodiff.rules.normalizations as normalizations
import torchlinop.autodiff.rules.parametrizations as parametrizations
import torchlinop.autodiff.rules.pointwise as pointwise
import torchlinop.autodiff.rules.recurrent as recurrent
import torchlinop.autodiff.rules.reductions as reductions
from torchlinop.autodiff.interruptible import InterruptibleMode
from torchlinop.autodiff.rules.functions import Rules, in_transform


def _set_grad_enabled(mode: bool) -> None:
    """Turn forward mode on and off with gradients, which torch does not."""
    torch._C._set_grad_enabled(mode)
    torch._C._set_fwd_grad_enabled(mode)


#: compositions of torch's own functions, which every transform can look into
_CORRECTIONS: Rules = {
    **attention.CORRECTIONS,
    **control_flow.CORRECTIONS,
    **embeddings.CORRECTIONS,
    **losses.CORRECTIONS,
    **normalizations.CORRECTIONS,
    **parametrizations.CORRECTIONS,
    **pointwise.CORRECTIONS,
    **recurrent.CORRECTIONS,
    **reductions.CORRECTIONS,
}
_RULES: Rules = {
    **_CORRECTIONS,
    **convolutions.RULES,
    **normalizations.RULES,
    **pointwise.RULES,
    **recurrent.RULES,
}
_FORWARD: Rules = {**_CORRECTIONS, torch._C._set_grad_enabled: _set_grad_enabled}


class Corrections(InterruptibleMode):
    """Mode in which derivatives that PyTorch gets wrong are right."""

    rules = _CORRECTIONS
    #: in a transform
    rules_inside = _CORRECTIONS

    def handle(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call the rule for ``func`` if there is one and it applies, else ``func``."""
        rule = (self.rules_inside if in_transform() else self.rules).get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class SecondOrderRules(Corrections):
    """Mode in which, moreover, second derivatives are cheap."""

    rules = _RULES


class ForwardCorrections(Corrections):
    """Mode of a derivative in forward mode: what is constant has no tangent."""

    rules = rules_inside = _FORWARD
