"""Several processes, each with a share of the data: the exact matrix on every one."""

from torchlinop.distributed.line import LostRankError

__all__ = ["LostRankError"]
