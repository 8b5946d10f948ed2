"""Models over ranks, on torch.distributed: a DAG spread over machines, and Fishers of models that are cut up.

`dampen_`, `plan` and `estimate_fisher` take models that FSDP2 or tensor parallel have cut up as they take others;
docs/distributed.md begins there.
"""

from ..ranks import Ranks, together
from .checkpoint import load, save
from .graph import InheritanceDAG
from .over_ranks import DistributedPlan, plan

__all__ = ["DistributedPlan", "InheritanceDAG", "Ranks", "load", "plan", "save", "together"]
