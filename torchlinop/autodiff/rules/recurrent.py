"""Recurrent networks without the fused kernels.

Those of GPUs have no second derivative. Those of CPUs have (torch 2.13), but products
through the graph of the explicit cells are faster, and vectorized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchlinop.autodiff.rules.functions import Rules


def _without_fused_kernels(func: Callable) -> Callable:
    def rule(*args: Any, **kwargs: Any) -> Any:
        # torch.backends.*.flags() would touch precision settings too, and warn
        enabled = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()
        torch._C._set_cudnn_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_cudnn_enabled(enabled[0])
            torch._C._set_mkldnn_enabled(enabled[1])

    return rule


CORRECTIONS: Rules = {
    func: _without_fused_kernels(func)
    for func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
