"""What the real models need around them."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _rules_on_small_tensors(monkeypatch):
    """These models are small; the rules for large tensors are to be used nevertheless."""
    modules = [m for n, m in sys.modules.items() if n.startswith("torchlinop.autodiff.")]
    thresholds = [m for m in modules if hasattr(m, "_SMALL")]
    assert thresholds
    for module in thresholds:
        monkeypatch.setattr(module, "_SMALL", 0)
