"""Fuzzing for as long as one likes: random sequences on live objects, random dampening cases, mutated files.

    python tests/fuzz/run.py --seconds 60 --seed 0 [--only live values interpreted files] [--out results.json]

Each part runs in a process of its own, which may crash: what it was doing is in a file by then. Prints what was done
and found; whatever was found is written to tests/fuzz/corpus, as short as it could be made, and ends with status 1.
tests/fuzz/test_fuzz.py does all of the corpus again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
sys.path[:0] = [str(HERE), str(HERE.parent)]
PARTS = {"live": 0.4, "values": 0.3, "interpreted": 0.15, "files": 0.15}  # shares of the time
BACKENDS = {"values": ("cpu", "reference"), "interpreted": ("triton",)}
SHAPE = {"values": {"parameters": 200, "run": 1.5}, "interpreted": {"parameters": 400, "run": 30.0}}
EXAMPLES, LENGTH = 25, 40  # sequences that hypothesis draws from one seed, and how long one is
MUTATED = 250  # files of each format and seed
MOST = 5  # findings, then a part ends


def keep(finding: dict[str, Any]) -> Path:
    """Write what was found to the corpus."""
    text = json.dumps(finding, indent=1) + "\n"
    path = CORPUS / f"{finding['part']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    CORPUS.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def again(finding: dict[str, Any]) -> None:
    """Do what was found once more; raises if it is still there."""
    if finding["part"] == "live":
        import live

        live.replay(finding["steps"])
        return
    if finding["part"] == "files":
        import files

        files.fuzz(finding["format"], MUTATED, finding["seed"])
        return
    import values

    cases = values.Cases(finding["seed"], **SHAPE[finding["part"]])
    for backend in BACKENDS[finding["part"]]:
        cases.check(backend)


def sequences(seed: int, examples: int, length: int, journal: Path | None = None) -> dict[str, Any] | None:
    """Sequences on live objects that hypothesis draws from a seed; the first that found something, made short."""
    import hypothesis
    import live
    from hypothesis.stateful import run_state_machine_as_test

    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=length,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # `live.shrunk` does the rest
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    live.Machine.failed = None
    try:
        live.Machine.journal = None if journal is None else journal.open("w+")
        run_state_machine_as_test(hypothesis.seed(seed)(live.Random), settings=settings)
    except Exception as error:
        live.Machine.journal = None
        steps = live.shrunk(live.Machine.failed or [])
        return {"part": "live", "error": f"{type(error).__name__}: {error}"[:400], "steps": steps}
    return None


def cases(part: str, seed: int) -> tuple[int, dict[str, Any] | None]:
    """One plan of random dampening cases: how many, and what was found."""
    import values

    made = values.Cases(seed, **SHAPE[part])
    try:
        for backend in BACKENDS[part]:
            made.check(backend)
    except Exception as error:
        return made.number, {"part": part, "seed": seed, "error": f"{type(error).__name__}: {error}"[:600]}
    return made.number, None


def mutated(seed: int) -> tuple[int, dict[str, Any] | None]:
    """Mutated files of each format: how many, and what was found."""
    import files

    for name in files.FORMATS:
        try:
            files.fuzz(name, MUTATED, seed)
        except files.WrongError as error:
            return 0, {"part": "files", "seed": seed, "format": name, "error": str(error)[:600]}
    return MUTATED * len(files.FORMATS), None


def work(part: str, seconds: float, seed: int, journal: Path) -> Iterator[dict[str, Any]]:
    """Until the time is over: what was done so far, and what was found."""
    begun, number, found = time.monotonic(), 0, 0
    while time.monotonic() - begun < seconds and found < MOST:
        extra: dict[str, Any] = {}
        if part == "live":
            import live

            finding = sequences(seed, EXAMPLES, LENGTH, journal)
            number += EXAMPLES
            extra = {"steps": live.Machine.taken, "calls": dict(sorted(live.Machine.calls.items()))}
        else:
            journal.write_text(json.dumps({"seed": seed}))
            done, finding = mutated(seed) if part == "files" else cases(part, seed)
            number += done
        found += finding is not None
        seed += 1
        spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time(), 1)}
        yield {"cases": number, **spent, **extra, "finding": finding}


def child(part: str, seconds: float, seed: int, journal: Path) -> None:
    """What a part's own process does: a line of JSON each time."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for line in work(part, seconds, seed, journal):
        print(json.dumps(line), flush=True)


def crashed(part: str, code: int, journal: Path) -> dict[str, Any]:
    """The finding of a process that ended before its time, from its journal."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    finding: dict[str, Any] = {"part": part, "error": f"the process ended with {code}"}
    if part == "live":
        return finding | {"steps": [json.loads(line) for line in lines]}
    return finding | json.loads(lines[-1] if lines else "{}")


def run(part: str, seconds: float, seed: int) -> dict[str, Any]:
    """A part in a process of its own: what was done, what was found."""
    findings: list[dict[str, Any]] = []
    last: dict[str, Any] = {"cases": 0, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        command = [sys.executable, __file__, "--child", part, "--seconds", str(seconds), "--seed", str(seed)]
        with subprocess.Popen([*command, "--journal", str(journal)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('{"cases"'):  # what hypothesis prints of a failure
                    continue
                last = json.loads(line)
                finding = last.pop("finding")
                if finding is not None:
                    findings.append(finding)
        if process.returncode != 0:
            findings.append(crashed(part, process.returncode, journal))
    kept = [str(keep(finding).relative_to(HERE.parent.parent)) for finding in findings]
    return {"part": part, "seed": seed, **last, "found": len(findings), "kept": kept}


def main() -> int:
    """Every part; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="over all parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seconds, options.seed, options.journal)
        return 0
    total, results = sum(PARTS[part] for part in options.only), []
    for part in options.only:
        result = run(part, options.seconds * PARTS[part] / total, options.seed)
        print(f"{part}: {result['cases']:,} cases in {result['seconds']} s from seed {options.seed}", end=", ")
        print(f"{result['found']} findings {' '.join(result['kept'])}".rstrip(), flush=True)
        results.append(result)
    if options.out is not None:
        import hypothesis

        from fiun_fast.bench.files import environment, write_json

        names = " ".join(options.only)
        record = {
            "command": f"python tests/fuzz/run.py --seconds {options.seconds:g} --seed {options.seed} --only {names}",
            "environment": {**environment(), "hypothesis": hypothesis.__version__},
            "parts": results,
        }
        write_json(options.out, record)
    return int(any(result["found"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
