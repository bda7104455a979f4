"""Solvers on rank 0, with the other ranks at its service."""

from __future__ import annotations

import pytest

from tests.distributed.launching import findings, torchrun


def test_serving(tmp_path):
    failed = findings("tests.distributed.serving", 2, tmp_path)
    assert not failed, failed


def test_example(tmp_path):
    pytest.importorskip("sklearn")
    status, output = torchrun("docs/examples/distributed.py", 2, tmp_path)
    assert status == 0, output
    assert output.count("eigenvalues") == 2
    assert "difference from one process" in output
