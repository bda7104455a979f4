"""Models that are wrapped, or sharded over the ranks."""

from __future__ import annotations

from tests.distributed.launching import findings


def test_two_ranks(tmp_path):
    failed = findings("tests.distributed.sharded", 2, tmp_path)
    assert not failed, failed


def test_four_ranks(tmp_path):
    """Two replicas of two shards; ranks that have nothing of a small parameter."""
    chosen = "placements", "sharded_vectors", "model_is_left_and_trains_on"
    failed = findings("tests.distributed.sharded", 4, tmp_path, *chosen)
    assert not failed, failed
