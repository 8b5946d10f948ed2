"""Is it really gone? What a model still knows of data that it was made to forget, measured in more than one way.

Needs scipy and scikit-learn: `pip install 'fiun_fast[evaluation]'`. docs/evaluation.md says what each measure can tell.
"""

from .accuracies import Accuracies, accuracies, tow
from .columns import MEASURES, Measured
from .distances import Klom, klom, untrained, zrf
from .intervals import Estimate
from .language import ForgetQuality, forget_quality, min_k, privleak, truth_ratios
from .membership import confidence_attack, entropy_attack, rmia
from .outputs import Answers, answers
from .overview import Evaluation, table
from .probes import Probe, probe
from .relearning import Relearning, relearn
from .roc import Attack
from .rounding import quantised, requantised
from .shadows import ShadowAttack, ulira

__all__ = [
    "MEASURES",
    "Accuracies",
    "Answers",
    "Attack",
    "Estimate",
    "Evaluation",
    "ForgetQuality",
    "Klom",
    "Measured",
    "Probe",
    "Relearning",
    "ShadowAttack",
    "accuracies",
    "answers",
    "confidence_attack",
    "entropy_attack",
    "forget_quality",
    "klom",
    "min_k",
    "privleak",
    "probe",
    "quantised",
    "relearn",
    "requantised",
    "rmia",
    "table",
    "tow",
    "truth_ratios",
    "ulira",
    "untrained",
    "zrf",
]
