"""Runs checks on a rank; what fails is written to a file."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# its functions have the group as a default argument: where it is imported only later on,
# as torch.func does, the group's threads outlive it, and sometimes end the process
import torch.distributed.nn

#: seconds after which a collective call gives up
TIMEOUT = 30


def start(timeout=TIMEOUT):
    """Join the group; return rank and size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def run(checks):
    """Run all checks, in the order of their names, on this rank."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    rank, size = start()
    errors = {}
    for name, check in sorted(checks.items()):
        begin = time.perf_counter()
        try:
            check(rank, size)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
        if os.environ.get("VERBOSE"):
            print(rank, name, round(time.perf_counter() - begin, 2), errors[name])
        if errors[name]:
            break  # the others would wait for what this rank leaves out
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(errors))
    if not any(errors.values()):
        dist.barrier()  # a rank that ends badly would end others that have not written yet
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of groups that device meshes have made outlive them, and abort the process
    os._exit(0)
