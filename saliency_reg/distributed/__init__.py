"""Collectives and checks of data-parallel processes: every process makes every call here, or none does.

Read in this order: ``ranks`` (the few collectives), ``joined_batch`` (distances of all processes as of one batch; here it is
decided that an absent task or an empty batch leaves nobody waiting), ``settings_check`` (are all processes set up alike?),
``sharded_heads`` (FSDP2), ``ddp`` (what DistributedDataParallel does not allow).
"""

from .ddp import StaticGraphCheck
from .joined_batch import Brought, Joined, JoinedBatch
from .ranks import Ranks
from .settings_check import compare_settings
from .sharded_heads import ShardedHeads, is_sharded

__all__ = [
    "Brought",
    "Joined",
    "JoinedBatch",
    "Ranks",
    "ShardedHeads",
    "StaticGraphCheck",
    "compare_settings",
    "is_sharded",
]
