"""Hypothesis: the same few examples in each run, or many new ones on request."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

_common = {
    "deadline": None,  # the first examples import and record
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", derandomize=True, max_examples=40, **_common)
#: pytest tests/faults --hypothesis-profile long --hypothesis-seed 1, then 2, 3, ...
settings.register_profile(
    "long", max_examples=2_000, phases=[Phase.generate, Phase.shrink], **_common
)
settings.load_profile("quick")  # before the command line's choice
