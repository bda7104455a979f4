"""Ranks that die, are late, or are interrupted: an error that names them, and an end."""

from __future__ import annotations

import json
import os
import signal
import time

from tests.distributed.launching import torchrun


def told(folder, rank):
    return json.loads((folder / f"{rank}.json").read_text())


def test_killed_in_a_product(tmp_path):
    torchrun("tests.distributed.losing", 4, tmp_path, "killed")
    for rank in (0, 2, 3):
        message, ranks = told(tmp_path, rank)
        assert ranks == [1], message
        assert f"Rank {rank} of 4 lost rank 1 (killed" in message
    assert not (tmp_path / "1.json").exists()


def test_late(tmp_path):
    torchrun("tests.distributed.losing", 2, tmp_path, "late")
    message, ranks = told(tmp_path, 0)
    assert ranks == [1], message
    assert "while multiplying with GGNLinearOperator" in message
    message, ranks = told(tmp_path, 1)
    assert "the others have given up waiting for it" in message


def test_ctrl_c(tmp_path):
    files = [tmp_path / f"{rank}.ready" for rank in range(2)]

    def press(process):
        end = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    torchrun("tests.distributed.losing", 2, tmp_path, "interrupted", meanwhile=press)
    for rank, file in enumerate(files):
        assert told(tmp_path, rank)[0] == "interrupted"
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            continue
        raise AssertionError("a process is left")
