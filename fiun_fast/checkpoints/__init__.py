"""Models on disk: folders of safetensors files, dampened as a family, piece by piece."""

from .engine import resume, rollback, unlearn
from .entries import ForgetEntry, ModelEntry, Tree
from .lineage import Found, Lineage, Origin, tree
from .lineage_text import write_tree
from .record import Verification, verify
from .result import ModelResult, Result
from .tree_file import read_tree

__all__ = [
    "ForgetEntry",
    "Found",
    "Lineage",
    "ModelEntry",
    "ModelResult",
    "Origin",
    "Result",
    "Tree",
    "Verification",
    "read_tree",
    "resume",
    "rollback",
    "tree",
    "unlearn",
    "verify",
    "write_tree",
]
