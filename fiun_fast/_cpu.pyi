# csrc/cpu/module.cpp: addresses and sizes in, nothing out; kinds are 0 fp32, 1 fp64, 2 bf16, 3 fp16.

def isa(isa: str = "") -> str: ...
def usable_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...
def use_openmp(address: int) -> None: ...
def dampen(
    rows: int,
    row_count: int,
    sources: int,
    weights: int,
    targets: int,
    alpha: int,
    lam: int,
    counts: int,
    slots: int,
    theta_kind: int,
    fisher_kind: int,
    merge: int,
    scale: float,
    exponent: float,
    cap: float,
    dry_run: bool,
    threads: int,
    isa: str = "",
) -> None: ...
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
    slots: int,
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
