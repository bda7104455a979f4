"""Contexts in which the rules apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

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
from torchlinop.autodiff.rules.functions import Rules, in_transform

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
}


class Corrections(TorchFunctionMode):
    """Context in which derivatives that PyTorch gets wrong are right."""

    rules = _CORRECTIONS
    #: set when the context is over: torch may put a mode back on its stack where an
    #: interrupt fell into the handling of a function
    over = False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call the rule for ``func`` if there is one and it applies, else ``func``."""
        kwargs = kwargs or {}
        if self.over:
            return func(*args, **kwargs)
        rule = (_CORRECTIONS if in_transform() else self.rules).get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class SecondOrderRules(Corrections):
    """Context in which, moreover, second derivatives are cheap."""

    rules = _RULES
