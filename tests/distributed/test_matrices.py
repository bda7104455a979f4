"""Ranks with shares of the data have the matrices of all data."""

from __future__ import annotations

import pytest

from tests.distributed.launching import findings


@pytest.mark.parametrize("ranks", [2, 4])
def test_matrices(ranks, tmp_path):
    failed = findings("tests.distributed.matrices", ranks, tmp_path)
    assert not failed, failed
