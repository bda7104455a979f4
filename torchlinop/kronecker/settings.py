"""What a user chooses about Kronecker factors."""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass
from typing import Any, TypeVar

from torchlinop.autodiff.losses import LikelihoodLoss
from torchlinop.kronecker.moments import WeightSharing
from torchlinop.kronecker.seeds import FisherType
from torchlinop.sources import EmpiricalRisk

Choice = TypeVar("Choice", bound=enum.Enum)


class Uncovered(enum.StrEnum):
    """What is done with parameters that no rule covers."""

    #: they are an error
    ERROR = "error"
    #: each is a block of the exact diagonal
    DIAGONAL = "diagonal"


@dataclass(frozen=True)
class Settings:
    """Keyword arguments that the Kronecker-factored operators share.

    Attributes
    ----------
    fisher_type : FisherType
    mc_samples, seed : int
    weight_sharing : WeightSharing
    joint_bias : bool
    uncovered : Uncovered
    """

    fisher_type: FisherType
    mc_samples: int
    seed: int
    weight_sharing: WeightSharing
    joint_bias: bool
    uncovered: Uncovered

    @classmethod
    def of(
        cls,
        risk: EmpiricalRisk,
        *,
        fisher_type: Any,
        mc_samples: Any,
        seed: Any,
        weight_sharing: Any = WeightSharing.EXPAND,
        joint_bias: bool = True,
        uncovered: Any = Uncovered.ERROR,
    ) -> Settings:
        """Check what the user has chosen.

        Raises
        ------
        ValueError
            A choice is not among the possible ones.
        TypeError
            Labels are to be drawn, but the loss has no known likelihood.
        """
        fisher_type = _choice("fisher_type", fisher_type, FisherType)
        try:
            mc_samples, seed = operator.index(mc_samples), operator.index(seed)
        except TypeError as error:
            raise ValueError(
                f"mc_samples and seed have to be integers, got {mc_samples!r}, {seed!r}."
            ) from error
        if mc_samples < 1:
            raise ValueError(f"mc_samples has to be at least 1, got {mc_samples}.")
        is_sampled = fisher_type is FisherType.MC
        if is_sampled and not isinstance(risk.loss, LikelihoodLoss):
            raise TypeError(
                "Labels can be drawn for CrossEntropyLoss, MSELoss and "
                f"BCEWithLogitsLoss only; the likelihood of {risk.loss_function!r} is not "
                "known. Use fisher_type='type-2', which takes any convex loss."
            )
        if mc_samples > 1 and not is_sampled:
            raise ValueError(
                f"mc_samples={mc_samples} has no meaning for fisher_type="
                f"{fisher_type.value!r}, where nothing is drawn. Pass fisher_type='mc'."
            )
        return cls(
            fisher_type,
            mc_samples,
            seed,
            _choice("weight_sharing", weight_sharing, WeightSharing),
            bool(joint_bias),
            _choice("uncovered", uncovered, Uncovered),
        )

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> Settings:
        """Make settings of their plain values, as they are in a file."""
        return cls(
            FisherType(values["fisher_type"]),
            values["mc_samples"],
            values["seed"],
            WeightSharing(values["weight_sharing"]),
            values["joint_bias"],
            Uncovered(values["uncovered"]),
        )


def _choice(name: str, value: Any, kind: type[Choice]) -> Choice:
    try:
        return kind(value)
    except ValueError as error:
        possible = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{name} has to be one of {possible}, got {value!r}.") from error
