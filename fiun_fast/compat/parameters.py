"""The `parameters` of these classes: known keys, defaults, checks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch

import fiun_fast as ff
from fiun_fast.dtensors import is_dtensor
from fiun_fast.memory import check_addressable

DEFAULTS: dict[str, Any] = {
    "lower_bound": 1,  # despite its name the upper bound of the factor
    "exponent": 1,
    "dampening_constant": 1,  # lambda
    "selection_weighting": 10,  # alpha
    "train_layer": None,
    "adaptive_percentile": None,
    "magnitude_diff": None,  # this and the following are unused, as in the published class
    "min_layer": -1,
    "max_layer": -1,
    "forget_threshold": 1,
}
NUMBERS = ("lower_bound", "exponent", "dampening_constant", "selection_weighting")
ADAPTIVE = ("adaptive", "auto")


def given(parameters: Any) -> dict[str, Any]:
    """The caller's parameters as a dict, from a dict or an object with attributes; misspelt keys are errors."""
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        given = {key: getattr(parameters, key) for key in DEFAULTS if hasattr(parameters, key)}
        if not given:
            raise ff.ArgumentError(f"parameters is a {type(parameters).__name__}, expected a dict")
        return given
    for key in parameters:
        near = difflib.get_close_matches(str(key), DEFAULTS, n=1, cutoff=0.8)
        if key not in DEFAULTS and near:
            raise ff.ArgumentError(f"parameters has {key!r}; did you mean {near[0]!r}?")
    return dict(parameters)


def is_device(value: Any) -> bool:
    """Whether it is a torch.device, or its name or index."""
    return isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool))


def check_finite(key: str, value: Any, most: float = math.inf) -> None:
    """Raise an ArgumentError unless the value is a finite number in 0..most."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ff.ArgumentError(f"parameters[{key!r}] is {value!r:.80}, expected a number") from None
    if isinstance(value, bool) or not (0 <= number <= most and math.isfinite(number)):
        wanted = "a finite number that is not negative" if most == math.inf else f"a number in 0..{most}"
        raise ff.ArgumentError(f"parameters[{key!r}] is {value}, expected {wanted}")


def check_whole(model: torch.nn.Module) -> None:
    """Raise a LayoutError for the first parameter of which this rank has a part: importances are whole tensors."""
    for name, p in model.named_parameters():
        if is_dtensor(p):
            check_addressable(f"parameter {name!r}", p)
