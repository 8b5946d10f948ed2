"""The command `fiun-fast`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import ESTIMATORS
from .checkpoint_commands import add_commands
from .demo import NETWORKS, SCOPES
from .errors import ArgumentError, FiunError
from .kernels import BACKENDS
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 0 for success, 1 for an error that was explained, 2 for wrong arguments."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except FiunError as error:
        print(f"fiun-fast: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line: each subcommand sets `run`, which takes the options and returns the exit status."""
    parser = argparse.ArgumentParser(prog="fiun-fast", description="Machine unlearning in inheritance networks, fast.")
    parser.add_argument("--version", action="version", version=f"fiun-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train four networks on real data, unlearn, show what happened")
    demo.add_argument("--scenario", action="append", choices=NETWORKS, help="only this one; may be repeated")
    demo.add_argument("--scope", choices=SCOPES, default="last-layer", help="parameters to dampen")
    demo.add_argument("--estimator", choices=ESTIMATORS, default="batch", help="of the Fishers; docs/fishers.md")
    demo.add_argument("--seed", type=int, action="append", help="default 0; with --all-classes, may be repeated")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for report.json and the pictures")
    demo.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    demo.add_argument("--backend", choices=BACKENDS, help="default: the fastest that works for the device")
    demo.add_argument("--all-classes", action="store_true", help="every class and pair, seeds 0 to 2: the full figures")
    demo.add_argument("--quick", action="store_true", help="seconds, not minutes: only shows that everything runs")
    demo.set_defaults(run=_demo)

    paper = commands.add_parser("paper", help="the paper's four networks: this package beside other methods; minutes")
    paper.add_argument("--out", type=Path, default=Path("paper.json"), help="results; goes on with those of a like run")
    paper.add_argument("--page", type=Path, help="a Markdown page whose tables are to be replaced")
    paper.add_argument("--network", action="append", help="only this one; may be repeated")
    paper.add_argument("--quick", action="store_true", help="hardly trained, one seed: only shows that everything runs")
    paper.set_defaults(run=_paper)

    bench = commands.add_parser("bench", help="how fast, next to existing code, to plain torch and to the hardware")
    bench.add_argument(
        "--case", action="append", help="only this case, or all with this prefix (a, b, g-hooks, …); may be repeated"
    )
    bench.add_argument("--quick", action="store_true", help="smaller sizes, some minutes")
    bench.add_argument("--device", action="append", help="cpu, cuda, …; may be repeated; default: what the machine has")
    bench.add_argument("--out", type=Path, help="folder for the results file; default: only print")
    bench.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes its time")
    bench.set_defaults(run=_bench)

    warmup = commands.add_parser("warmup", help="compile the Triton kernels ahead of the first run")
    warmup.add_argument("--target", help='"cuda:90", "hip:gfx942", …; default: the GPU of this machine')
    warmup.set_defaults(run=_warmup)

    gpu = commands.add_parser(
        "gpu", help="ask a machine with a GPU everything: parity, speed, memory; one page, one JSON"
    )
    gpu.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for gpu.json and gpu.md")
    gpu.add_argument("--minutes", type=float, default=20.0, help="at the most; steps get shorter with it")
    gpu.add_argument("--only", action="append", metavar="STEP", help="only this step; may be repeated")
    gpu.add_argument(
        "--dry", action="store_true", help="every step on the CPU, in some minutes: only shows that all works"
    )
    gpu.set_defaults(run=_gpu)

    add_commands(commands)

    doctor = commands.add_parser("doctor", help="what is installed, which backends work here and why others do not")
    doctor.set_defaults(run=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from .demo.run import SEEDS, run_demo
    except ModuleNotFoundError as error:
        print(f"fiun-fast: the demo needs {error.name}: pip install 'fiun_fast[demo]'", file=sys.stderr)
        return 1
    seeds = options.seed or list(SEEDS if options.all_classes else SEEDS[:1])
    if len(seeds) > 1 and not options.all_classes:
        raise ArgumentError("--seed is there more than once, which is for --all-classes")
    run_demo(
        scenarios=options.scenario or NETWORKS,
        seed=seeds[0],
        seeds=seeds,
        out=options.out,
        device=options.device,
        scope=options.scope,
        estimator=options.estimator,
        backend=options.backend,
        all_classes=options.all_classes,
        quick=options.quick,
    )
    return 0


def _paper(options: argparse.Namespace) -> int:
    try:
        from .paper.run import SEEDS, run_paper
    except ModuleNotFoundError as error:
        print(f"fiun-fast: the paper's data needs {error.name}: pip install 'fiun_fast[demo]'", file=sys.stderr)
        return 1
    seeds = SEEDS[:1] if options.quick else SEEDS
    run_paper(out=options.out, page=options.page, networks=options.network, seeds=seeds, quick=options.quick)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .bench.run import main

    compiler = None if options.no_compile else "inductor"
    return main(options.case, "quick" if options.quick else "full", options.device, compiler, options.out)


def _warmup(options: argparse.Namespace) -> int:
    try:
        from .kernels.triton_aot import warmup
    except ModuleNotFoundError as error:
        print(f"fiun-fast: warmup needs {error.name}: pip install 'fiun_fast[triton]'", file=sys.stderr)
        return 1
    print(f"{warmup(options.target, print)} kernels compiled")
    return 0


def _gpu(options: argparse.Namespace) -> int:
    from .gpu.run import main

    return main(options.out, options.only, options.minutes, options.dry)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
