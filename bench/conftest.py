"""Options and the session of the benchmarks: `pytest bench` measures, prints the table and writes bench/results/."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fiun_fast.bench import run

RESULTS = Path(__file__).parent / "results"
RUNS = pytest.StashKey[dict[str, run.Bench]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fiun_fast")
    group.addoption("--mode", choices=("full", "quick", "tiny"), default="full", help="sizes of the benchmarks")
    group.addoption("--devices", nargs="*", help="cpu, cuda, …; default: what the machine has")
    group.addoption("--out", type=Path, default=RESULTS, help="folder for the results files")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # those of torch.compile are not ours
    config.stash[RUNS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each device and case of the mode."""
    devices = metafunc.config.getoption("--devices") or run.present()
    names = run.select(None, metafunc.config.getoption("--mode"))
    metafunc.parametrize(("device", "name"), [(d, n) for d in devices for n in names])


@pytest.fixture
def bench(device: str, request: pytest.FixtureRequest) -> run.Bench:
    """The run on that device; one for all its cases."""
    runs = request.config.stash[RUNS]
    if device not in runs:
        runs[device] = run.Bench(request.config.getoption("--mode"), torch.device(device))
    return runs[device]


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Print the tables and write a file for each device; with -k, case by case, a partial one until it is complete."""
    console = Console(width=max(120, shutil.get_terminal_size().columns))
    mode = config.getoption("--mode")
    for measured in config.stash[RUNS].values():
        record = measured.record
        run.show(record, console)
        path = run.path_for(record, config.getoption("--out"))
        partial = path.with_name(f"{path.stem}.partial.json")
        kept = record.keep(partial if partial.exists() else path, run.select(None, mode))
        missing = set(run.select(None, mode)) - set(record.cases)
        record.save(partial if missing else path)
        if not missing:
            partial.unlink(missing_ok=True)
        console.print(f"written: {(partial if missing else path).name}")
        for what, cases in (("kept of it", kept), ("not measured yet", missing)):
            if cases:
                console.print(f"{what}: {', '.join(sorted(cases))}")
