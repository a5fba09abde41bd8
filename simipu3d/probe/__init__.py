"""What does a frozen backbone know? Linear probe on its cells, and retrieval between matched tokens."""

from simipu3d.probe.linear import ProbeData, gather_data, recompute_batchnorm
from simipu3d.probe.retrieval import chance_top1, retrieval_top1
from simipu3d.probe.table import AFTER, RANDOM, ROW_MEAN, ProbeTable, probe_table

__all__ = [
    "ProbeData",
    "gather_data",
    "recompute_batchnorm",
    "probe_table",
    "ProbeTable",
    "ROW_MEAN",
    "RANDOM",
    "AFTER",
    "retrieval_top1",
    "chance_top1",
]
