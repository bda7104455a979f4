"""Starts ranks with torchrun, and says what each of them found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
#: seconds that a start may take
LIMIT = 90

if not torch.distributed.is_available():  # some builds lack it
    import pytest

    pytest.skip("torch.distributed is not available", allow_module_level=True)


def torchrun(program, ranks, folder, *arguments, limit=LIMIT, meanwhile=None):
    """Run a module or a script on several ranks; return its exit status and output.

    All processes are gone afterwards. ``meanwhile`` is called with that of torchrun.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}"]
    command += [program] if program.endswith(".py") else ["-m", program]
    command += [str(folder), *arguments]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | threads | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(process)
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            output, _ = process.communicate(timeout=60)
            print(output)
    return process.returncode, output


def findings(module, ranks, folder, *arguments):
    """Run the checks of a module on several ranks; return what failed, as text."""
    status, output = torchrun(module, ranks, folder, *arguments)
    failed = {}
    for rank in range(ranks):
        path = Path(folder) / f"{rank}.json"
        if not path.exists():
            return output
        failed |= {
            f"{name} on rank {rank}": error
            for name, error in json.loads(path.read_text()).items()
            if error
        }
    if status and not failed:
        return output
    return "\n".join(f"{where}: {error}" for where, error in failed.items())
