"""Recording never ends the process, and does not change a product."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.autodiff.recorded_functions import LINEAR, PROGRAMS, SCALARS, VECTORS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports():
    """Run all functions in one process of their own: a crash ends it, and the lines."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.autodiff.recorded_functions"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    found = {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}
    return found, f"exit status {run.returncode}\n{run.stderr[-2000:]}"


@pytest.mark.parametrize("name", [*SCALARS, *VECTORS, *LINEAR])
def test_recorded_function(reports, name):
    found, ending = reports
    assert name in found, ending
    assert found[name]["error"] < 1e-13
    assert found[name]["replayed"] is LINEAR.get(name, (None, True))[1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_random_programs(reports, name):
    found, ending = reports
    assert name in found, ending
    assert found[name]["error"] < 100
    assert found[name]["replayed"] > 0.7  # others are zero, or do not depend on x
