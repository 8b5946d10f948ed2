"""fiun_fast: Fisher-based machine unlearning in inheritance networks, at the price of reading the weights once.

Method: FIUn with MFIM (arXiv 2408.08493); for one model, Selective Synaptic Dampening (arXiv 2308.07707).
"""

from . import checkpoints as checkpoints
from . import distributed as distributed
from . import evaluation as evaluation
from .dag import ForgetRequest, InheritanceDAG, Node
from .errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    DagError,
    DeviceError,
    DistributedError,
    DTypeError,
    EstimationError,
    EstimationWarning,
    FallbackWarning,
    FileWriteError,
    FisherFileError,
    FiunError,
    LayoutError,
    MissingPackageError,
    NotForgottenError,
    ProvenanceWarning,
    ScopeWarning,
    TreeFileError,
    TuningWarning,
    UndoError,
    UndoFileError,
)
from .estimators import FisherAccumulator, estimate_fisher, estimate_fishers
from .fisher import Fisher, merge_fishers, top_overlap
from .forgetting import unlearn_
from .gradient import Gradient
from .kernels import available_backends, use_backend
from .layout import Layout, Segment, Shard
from .outcome import NodeOutcome, Outcome
from .planning import Choice, Plan, Trials
from .profile import Profiles, SelectionProfile
from .provenance import Provenance
from .ratios import adaptive_alpha
from .report import NodeReport, ParameterReport, Report
from .rounds import Round, Rounds, unlearn_rounds_
from .scope import last_layer
from .scores import ClassScore
from .sequence_score import SequenceScore
from .storage import flatten_, stack_
from .tuned import TriedPoint, Tuned
from .tuning import search_alpha, tune
from .undo import UndoLog
from .unlearning import dampen_, plan, selection_profile
from .version import __version__

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "Choice",
    "ClassScore",
    "DTypeError",
    "DagError",
    "DeviceError",
    "DistributedError",
    "EstimationError",
    "EstimationWarning",
    "FallbackWarning",
    "FileWriteError",
    "Fisher",
    "FisherAccumulator",
    "FisherFileError",
    "FiunError",
    "ForgetRequest",
    "Gradient",
    "InheritanceDAG",
    "Layout",
    "LayoutError",
    "MissingPackageError",
    "Node",
    "NodeOutcome",
    "NodeReport",
    "NotForgottenError",
    "Outcome",
    "ParameterReport",
    "Plan",
    "Profiles",
    "Provenance",
    "ProvenanceWarning",
    "Report",
    "Round",
    "Rounds",
    "ScopeWarning",
    "Segment",
    "SelectionProfile",
    "SequenceScore",
    "Shard",
    "TreeFileError",
    "Trials",
    "TriedPoint",
    "Tuned",
    "TuningWarning",
    "UndoError",
    "UndoFileError",
    "UndoLog",
    "__version__",
    "adaptive_alpha",
    "available_backends",
    "dampen_",
    "estimate_fisher",
    "estimate_fishers",
    "flatten_",
    "last_layer",
    "merge_fishers",
    "plan",
    "search_alpha",
    "selection_profile",
    "stack_",
    "top_overlap",
    "tune",
    "unlearn_",
    "unlearn_rounds_",
    "use_backend",
]
