"""What arguments may be: closed sets of strings, dtypes, numbers; each is defined and checked here and nowhere else."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import torch

from .errors import ArgumentError

MergeRule = Literal["max", "mean", "sum"]
OnMismatch = Literal["error", "skip"]
Estimator = Literal["batch", "softened", "sample", "expected", "label_free"]
Per = Literal["sequence", "token"]
TuneBy = Literal["node", "layer"]
BackendName = Literal["reference", "cpu", "triton", "cuda"]

MERGE_RULES: tuple[str, ...] = get_args(MergeRule)
TUNE_BY: tuple[str, ...] = get_args(TuneBy)
MISMATCH_RULES: tuple[str, ...] = get_args(OnMismatch)
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
PER: tuple[str, ...] = get_args(Per)
BACKENDS: tuple[str, ...] = get_args(BackendName)

THETA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of parameters and their gradients
FISHER_DTYPES = (torch.float32, torch.float64)

Function = TypeVar("Function", bound=Callable[..., Any])


def short(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def listed(dtypes: Iterable[torch.dtype]) -> str:
    """Names of dtypes, as error messages list them: "float32, float64 or bfloat16"."""
    *names, last = map(short, dtypes)
    return f"{', '.join(names)} or {last}" if names else last


def check_one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise an ArgumentError that lists what is known, where `value` is not among it."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{what} is {value!r:.80}, expected one of {', '.join(known)}")


def check_number(what: str, value: object, dtype: torch.dtype = torch.float64) -> float:
    """The value as a float; an ArgumentError names `what` where it is negative, not finite, or too large for dtype."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentError(f"{what} is a {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(f"{what} is too large for a float, expected a finite number") from None
    if not 0 <= number <= torch.finfo(dtype).max:
        raise ArgumentError(f"{what} is {number}, expected a finite number that is not negative")
    return number


def check_numbers(what: str, values: object) -> list[float]:
    """The values as floats, one or more; an ArgumentError names `what` and the place of one that is out of range."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{what} is a {type(values).__name__}, expected numbers")
    found = [check_number(f"{what}[{i}]", value) for i, value in enumerate(values)]
    if not found:
        raise ArgumentError(f"{what} is empty: nothing to try")
    return found


def check_fraction(what: str, value: object, meaning: str) -> float:
    """The value as a float; an ArgumentError names `what` and its meaning where it is not in (0, 1]."""
    number = check_number(what, value)
    if not 0 < number <= 1:
        raise ArgumentError(f"{what} is {number:g}, expected {meaning}")
    return number


def check_count(what: str, value: object, least: int = 1, most: int | None = None) -> int:
    """The value, a whole number from `least` to `most`; an ArgumentError names `what` where it is anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ArgumentError(f"{what} is {value!r:.80}, expected a whole number of at least {least}")
    if most is not None and int(value) > most:
        raise ArgumentError(f"{what} is {hex(int(value)):.20}…, expected a whole number of at most {most}")
    return int(value)


_UNITS = {"": 1, **{f"{p}B": 1000**k for k, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{p}iB": 1024**k for k, p in enumerate(("", "K", "M", "G", "T")) if k}


def check_size(what: str, value: object) -> int:
    """A number of bytes, at least 1, of a whole number or a text: "2GB", "500 MB" (10^6), "1.5GiB" (2^30)."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d{1,18}|\d{0,18}\.\d{1,18})\s*([KMGT]i?B|B|)", value.strip())
        if found is None:
            raise ArgumentError(f"{what} is {value!r:.80}, expected a size such as 2GB, 500MB or 1.5GiB")
        value = math.floor(Fraction(found[1]) * _UNITS[found[2]])
    return check_count(what, value, most=2**63 - 1)


def check_function(what: str, function: object, *arguments: str) -> None:
    """Raise an ArgumentError unless it is a function that can be called with arguments of these meanings, by place."""
    called = f"called as {what}({', '.join(arguments)})"
    if not callable(function) or isinstance(function, type):
        found = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
        raise ArgumentError(f"{what} is {found}, expected a function, {called}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ArgumentError(f"{what} takes {signature} and is {called}: {error}") from None


def renamed(**names: str) -> Callable[[Function], Function]:
    """For a function some of whose arguments had another name in version 0.1: the old one is an error that says so."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    raise TypeError(f"{function.__name__}() has no argument {old!r} any more: it is now {new!r}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
