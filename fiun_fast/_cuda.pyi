# csrc/cuda/module.cpp: addresses, sizes and a stream in; kinds are those of csrc/kinds.h.

architectures: str
toolkit_version: int
tile_bytes: int
tile_targets: int

def driver_version() -> int: ...
def capabilities() -> list[int]: ...
def tile_shape(theta_kind: int, fisher_kind: int) -> tuple[int, int]: ...
def resident_warps(device: int, theta_kind: int, fisher_kind: int, with_exponent: bool) -> int: ...
def dampen(
    device: int,
    tiles: int,
    tile_count: int,
    sources: int,
    weights: int,
    targets: int,
    limits: int,
    counts: int,
    theta_kind: int,
    fisher_kind: int,
    merge: int,
    scale: float,
    exponent: float,
    cap: float,
    dry_run: bool,
    stream: int,
) -> None: ...
def histogram_warps(device: int, fisher_kind: int) -> int: ...
def histogram(
    device: int,
    tiles: int,
    runs: int,
    run_count: int,
    sources: int,
    weights: int,
    targets: int,
    bases: int,
    counts: int,
    fisher_kind: int,
    merge: int,
    scale: float,
    low: int,
    nearest: bool,
    stream: int,
) -> None: ...
def merge(
    device: int,
    sources: int,
    weights: int,
    count: int,
    out: int,
    n: int,
    fisher_kind: int,
    how: int,
    scale: float,
    stream: int,
) -> None: ...
def accumulate(device: int, pairs: int, pair_count: int, square: bool, zero: bool, stream: int) -> None: ...
def add_squares(device: int, into: int, products: int, rows: int, n: int, fisher_kind: int, stream: int) -> None: ...
