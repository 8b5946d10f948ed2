# csrc/cpu/module.cpp: addresses and sizes in; kinds are those of csrc/kinds.h.
from typing import Any

def isa(isa: str = "") -> str: ...
def usable_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...
def use_openmp(parallel: int, thread_number: int) -> None: ...

class DampenLaunch:
    threads: int
    def __init__(
        self,
        rows: int,
        row_count: int,
        sources: int,
        weights: int,
        targets: int,
        fisher_kind: int,
        merge: int,
        scale: float,
        theta_kind: int,
        alpha: int,
        lam: int,
        exponent: float,
        cap: float,
        threads: int,
    ) -> None: ...
    def run(self, counts: int, dry_run: bool, isa: str = "") -> None: ...

def merge(
    sources: int,
    weights: int,
    count: int,
    out: int,
    n: int,
    fisher_kind: int,
    how: int,
    scale: float,
    threads: int,
    isa: str = "",
) -> None: ...
def accumulate(pairs: int, pair_count: int, square: bool, zero: bool, threads: int, isa: str = "") -> None: ...
def histogram(
    rows: int,
    row_count: int,
    sources: int,
    weights: int,
    targets: int,
    fisher_kind: int,
    merge: int,
    scale: float,
    bases: int,
    low: int,
    nearest: bool,
    counts: int,
    threads: int,
    isa: str = "",
) -> None: ...
def add_squares(into: int, products: int, rows: int, n: int, fisher_kind: int, threads: int, isa: str = "") -> None: ...
def outer_square(
    left: int,
    right: int,
    into: int,
    samples: int,
    positions: int,
    m: int,
    k: int,
    left_sample: int,
    left_step: int,
    right_sample: int,
    right_step: int,
    threads: int,
    isa: str = "",
) -> None: ...
def all_held(mappings: list[Any], keys: list[str], objects: list[Any]) -> bool: ...

class Held:
    def all(self, mappings: list[Any], keys: list[str], objects: list[Any], threads: int) -> bool: ...
    @staticmethod
    def number(mapping: Any) -> int: ...

class Places:
    def __init__(self, functions: list[int]) -> None: ...
    def take(self, tensors: list[Any]) -> None: ...
    def unchanged(self, tensors: list[Any]) -> bool: ...
    def of(self, tensor: Any) -> list[int]: ...
