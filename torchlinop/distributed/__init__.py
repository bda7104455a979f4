"""Several processes, each with a share of the data: the exact matrix on every one.

Processes are those of :mod:`torch.distributed` (gloo on CPUs, NCCL on GPUs), started by
``torchrun``. Every operator of model and data takes ``process_group=``: see
:class:`torchlinop.Options`.
"""

from torchlinop.distributed.columns import split_columns
from torchlinop.distributed.driver import broadcast, driver
from torchlinop.distributed.line import LostRankError

__all__ = ["LostRankError", "broadcast", "driver", "split_columns"]
