"""What timm asks of torchvision when it is imported, and its models never use.

timm's models take one class of torchvision, a frozen batch norm that they look for but do
not build; the rest is for its image pipelines. torchvision itself is compiled for one
version of torch and would replace the installed one.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import nn

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


class FrozenBatchNorm2d(nn.Module):
    """Looked for by ``isinstance``."""


class InterpolationMode(enum.Enum):
    """Keys of a table."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(ModuleType):
    """A module in which every name is a class without content."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def provide_torchvision() -> None:
    """Put the stand-in in the place of a torchvision that is not installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
        return
    modules = {name: _Module(name) for name in _MODULES}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = FrozenBatchNorm2d
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        modules[name].InterpolationMode = InterpolationMode
    sys.modules.update(modules)
