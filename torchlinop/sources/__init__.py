"""What an operator linearizes: a model on data, with a loss, or a plain function."""

from torchlinop.sources.function import TorchFunction
from torchlinop.sources.model import ModelOnData
from torchlinop.sources.options import Options
from torchlinop.sources.protocol import ScalarSource, Source
from torchlinop.sources.risk import EmpiricalRisk

__all__ = [
    "EmpiricalRisk",
    "ModelOnData",
    "Options",
    "ScalarSource",
    "Source",
    "TorchFunction",
]
