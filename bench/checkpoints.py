"""Models on disk: a family of three, against copying the folders and against loading, dampening and saving each.

    python bench/checkpoints.py                 prints a table and writes bench/results/checkpoints.json
    python bench/checkpoints.py --gigabytes 0.1 --rounds 1 --dry     tries it out

Folders with the names and shapes of a Llama in float32, two shards each, are made in a temporary folder (--folder),
which needs twelve times the size of a model. Before every measurement their files are taken out of the page cache.
Each measurement is a process of its own: wall time from its first line to its last (imports apart), the process's peak
resident memory, and what the kernel says it wrote to disk.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast import checkpoints
from fiun_fast.bench.files import environment, fill, markdown, write_json

TARGET = Path(__file__).parent / "results" / "checkpoints.json"
PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
MODELS, WIDTH, INNER, WORDS = ("base", "chat", "code"), 2048, 5632, 32000
PARENTS = {"base": [], "chat": ["base"], "code": ["chat"]}
NUMBERS = {"alpha": 10.0, "lam": 1.0}
WHAT, HOW = ("read", "write"), ("direct", "through the page cache", "mmap")
LINE = 16  # elements of float32 in 64 bytes

# what the child processes run; FOLDER is argv[1], the Fishers' kind argv[2], the result's folder argv[3]
UNLEARN = """
import json, sys, time
import torch
import fiun_fast as ff
from fiun_fast.checkpoints import unlearn, rollback
from fiun_fast import checkpoints
from fiun_fast.bench.files import environment
root, kind, out = sys.argv[1:4]
began = time.perf_counter()
if sys.argv[4] == "in_place":
    result = unlearn(f"{root}/{kind}.toml", in_place=True, journal=out)
else:
    result = unlearn(f"{root}/{kind}.toml", out=out)
seconds = time.perf_counter() - began
written = next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("write_bytes"))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
moved = result.bytes_read + result.bytes_written
print(json.dumps({"seconds": seconds, "peak": peak, "written": written, "moved": moved, "selected": result.selected}))
"""
# one way to read or write files, `argv[1]`, in pieces of 16 MB
WAYS = """
import json, mmap, os, sys, time
import numpy as np
how, out, *paths = sys.argv[1:]
BLOCK, STEP = 4096, 16 << 20
room = np.frombuffer(mmap.mmap(-1, STEP), np.uint8)
began, total = time.perf_counter(), 0
for path in paths:
    size = os.stat(path).st_size // BLOCK * BLOCK
    total += size
    writes = how.startswith("write")
    flags = (os.O_RDWR | os.O_CREAT) if writes else os.O_RDONLY
    flags |= os.O_DIRECT if "direct" in how else 0
    fd = os.open(f"{out}/{os.path.basename(path)}" if writes else path, flags, 0o600)
    if writes:
        os.posix_fallocate(fd, 0, size)
    mapped = None
    if "mmap" in how:
        kind = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        mapped = np.frombuffer(mmap.mmap(fd, size, mmap.MAP_SHARED, kind), np.uint8)
    for at in range(0, size, STEP):
        part = room[: min(STEP, size - at)]
        if mapped is not None and writes:
            mapped[at : at + len(part)] = part
        elif mapped is not None:
            part[:] = mapped[at : at + len(part)]
        elif (os.pwritev if writes else os.preadv)(fd, [part], at) != len(part):
            raise SystemExit("a short transfer")
    if writes:
        os.fsync(fd)
    os.close(fd)
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": total}))
"""
TEXTBOOK = """
import json, os, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
root, kind, out = sys.argv[1:4]
alpha, lam = float(sys.argv[4]), float(sys.argv[5])
began = time.perf_counter()
def load(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found
selected = 0
for name in ("base", "chat", "code"):
    original, forget = load(f"{root}/{kind}/{name}.fisher"), load(f"{root}/{kind}/forget.fisher")
    theta = load(f"{root}/{name}")
    for key, importance in original.items():
        f, i = forget[key].float(), importance.float()
        chosen = f > i * alpha
        factor = (i * lam / f).clamp(max=1.0)
        theta[key] = torch.where(chosen, theta[key] * factor, theta[key])
        selected += int(chosen.sum())
    (Path(out) / name).mkdir(parents=True)
    for path in sorted(Path(f"{root}/{name}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            save_file({key: theta[key] for key in file.keys()}, Path(out) / name / path.name, file.metadata())
for path in Path(out).rglob("*.safetensors"):  # as safe as what it is compared with
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
seconds = time.perf_counter() - began
written = next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("write_bytes"))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "written": written, "selected": selected}))
"""


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a Llama of about that many bytes in float32."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    layer = 0
    while 4 * sum(torch.Size(shape).numel() for shape in found.values()) < gigabytes * 1e9 - 4 * WORDS * WIDTH:
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        found |= {f"{at}.mlp.{p}_proj.weight": (INNER, WIDTH) for p in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{at}.{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
        layer += 1
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def noise(shape: tuple[int, ...], seed: int, fisher: bool) -> torch.Tensor:
    """Random numbers, of which a few million are repeated: what they are does not change the time much."""
    dice = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    few = min(numel, 1 << 22)
    block = torch.empty(few).uniform_(-14, 0, generator=dice).exp2() if fisher else torch.randn(few, generator=dice)
    return block.repeat(-(-numel // few))[:numel].reshape(shape)


def make(root: Path, gigabytes: float) -> None:
    """Models, Fishers of four kinds, and a tree for each kind."""
    whole = shapes(gigabytes)
    names = list(whole)
    for k, model in enumerate(MODELS):
        folder = root / model
        folder.mkdir()
        where = {}
        for part, held in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            file = f"model-{part:05d}-of-00002.safetensors"
            save_file(
                {n: noise(whole[n], 1000 * k + i, False) for i, n in enumerate(held)}, folder / file, {"format": "pt"}
            )
            where |= dict.fromkeys(held, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text('{"model_type": "llama"}')
    last = sorted(name for name in whole if "layers.0" in name)
    for kind, chosen, dtype in (
        ("float32", names, None),
        ("bfloat16", names, torch.bfloat16),
        ("few", last, None),
        ("lines", names, torch.bfloat16),
    ):
        (root / kind).mkdir()
        text = [f"alpha = {NUMBERS['alpha']}", f"lam = {NUMBERS['lam']}"]
        for seed, who in enumerate((*MODELS, "forget")):
            values = {n: noise(whole[n], 7000 + 100 * seed + i, True) for i, n in enumerate(chosen)}
            if kind == "lines" and who == "forget":
                values = {n: in_lines(value, i) for i, (n, value) in enumerate(values.items())}
            ff.Fisher.from_dict(values).save(root / kind / f"{who}.fisher", shard_size="1GB", dtype=dtype)
            del values
        for model in MODELS:
            text += ["[[model]]", f'name = "{model}"', f'path = "{model}"', f'fisher = "{kind}/{model}.fisher"']
            text += [f"parents = {json.dumps(PARENTS[model])}"]
        text += ["[[forget]]", 'origin = "base"', f'fisher = "{kind}/forget.fisher"']
        (root / f"{kind}.toml").write_text("\n".join(text) + "\n")


def in_lines(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Large in 1 % of the lines of 64 bytes, at random places, else 0: nothing else can be selected."""
    flat = torch.zeros(values.numel())
    lines = flat[: flat.numel() // LINE * LINE].view(-1, LINE)
    lines[torch.rand(len(lines), generator=torch.Generator().manual_seed(seed)) < 0.01] = 1e6
    return flat.view(values.shape)


def cold(root: Path) -> None:
    """Nothing of these files is in the page cache any more."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@contextlib.contextmanager
def machine(lock: str | None) -> Iterator[None]:
    """Have the machine alone, where others take the same lock."""
    with contextlib.ExitStack() as stack:
        if lock:
            file = stack.enter_context(Path(lock).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def child(code: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own prints."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def copied(root: Path, out: Path, flushed: bool) -> dict[str, Any]:
    """`cp -r` of the three folders; `flushed`: until it is on disk."""
    out.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", *(str(root / model) for model in MODELS), str(out)], check=True)
    if flushed:
        subprocess.run(["sync", *map(str, out.rglob("*.safetensors"))], check=True)
    return {"seconds": time.perf_counter() - began}


def measured(root: Path, rounds: int, lock: str | None) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """All variants in every round: what there is after each."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was cut short
    alpha, lam = str(NUMBERS["alpha"]), str(NUMBERS["lam"])
    variants: dict[str, Callable[[], dict[str, Any]]] = {
        "cp -r": lambda: copied(root, out, False),
        "cp -r, sync": lambda: copied(root, out, True),
        "out, float32": lambda: child(UNLEARN, str(root), "float32", str(out), "out"),
        "out, bfloat16": lambda: child(UNLEARN, str(root), "bfloat16", str(out), "out"),
        "out, few": lambda: child(UNLEARN, str(root), "few", str(out), "out"),
        "out, lines": lambda: child(UNLEARN, str(root), "lines", str(out), "out"),
        "textbook, float32": lambda: child(TEXTBOOK, str(root), "float32", str(out), alpha, lam),
        "in place, lines": lambda: child(UNLEARN, str(root), "lines", str(out), "in_place"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            with machine(lock):
                cold(root)
                found[name].append(run())
            if name == "in place, lines":
                checkpoints.rollback(out)
            shutil.rmtree(out)
            print(f"{name:20} {found[name][-1]}", flush=True)
        yield found


def ways(root: Path, rounds: int) -> dict[str, float]:
    """How the files of one model are read and written: GB/s, medians."""
    kinds = [f"{what} {how}" for what in WHAT for how in HOW]
    paths = [str(path) for path in sorted((root / MODELS[0]).glob("*.safetensors"))]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            with tempfile.TemporaryDirectory(dir=root) as out:
                cold(root)
                run = child(WAYS, kind, out, *paths)
                found[kind].append(run["bytes"] / run["seconds"] / 1e9)
    return {kind: statistics.median(runs) for kind, runs in found.items()}


def main() -> None:
    """Make the folders, measure, delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.1, help="of each of the three models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument(
        "--keep", help="a folder to make, and leave there for another run, in the place of a temporary one"
    )
    parser.add_argument("--lock", help="a file that is locked while something is timed")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--ways", action="store_true", help="only how files are read and written, kept beside the rest")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        if not (root / "lines.toml").exists():  # what is made last
            root.mkdir(exist_ok=True)
            make(root, options.gigabytes)
        how = ways(root, options.rounds)
        if options.ways:
            results = json.loads(TARGET.read_text()) | {"ways": how}
            print(tables(results))
            write_json(TARGET, results)
            fill(PAGE, "measured", tables(results))
            return
        bytes_of_models = sum(path.stat().st_size for model in MODELS for path in (root / model).iterdir())
        for found in measured(root, options.rounds, options.lock):
            results = results_of(bytes_of_models, found, how)
            if not options.dry:  # after every round, so that a run that is cut short is not lost
                write_json(TARGET, {"environment": environment(), **results})
                fill(PAGE, "measured", tables(json.loads(TARGET.read_text())))
    print(tables(results))


def results_of(bytes_of_models: int, found: dict[str, list[dict[str, Any]]], how: dict[str, float]) -> dict[str, Any]:
    """Medians, and how they compare."""
    rows = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    copy, chain = rows["cp -r"]["seconds"], rows["textbook, float32"]
    for row in rows.values():
        row["gigabytes_per_second"] = bytes_of_models / row["seconds"] / 1e9
        row["of_cp"] = copy / row["seconds"]
        row["of_synced"] = rows["cp -r, sync"]["seconds"] / row["seconds"]
        row["of_textbook"] = chain["seconds"] / row["seconds"]
        if "peak" in row:
            row["peak_of_textbook"] = row["peak"] / chain["peak"]
        if "moved" in row:
            row["moved_per_second"] = row["moved"] / row["seconds"] / 1e9
    rounds = max(len(runs) for runs in found.values())
    return {"bytes_of_models": bytes_of_models, "rounds": rounds, "medians": rows, "runs": found, "ways": how}


def tables(results: dict[str, Any]) -> str:
    """What docs/checkpoints.md shows of the results."""
    rows = results["medians"]
    shown = [
        [
            name,
            f"{row['seconds']:.1f}",
            f"{row['gigabytes_per_second']:.2f}",
            f"{row['of_cp']:.2f}",
            f"{row['of_synced']:.2f}",
            f"{row['moved_per_second']:.2f}" if "moved_per_second" in row else "",
            f"{row['peak'] / 1e9:.2f}" if "peak" in row else "",
            f"{row['written'] / 1e9:.2f}" if "written" in row else "",
        ]
        for name, row in rows.items()
    ]
    heads = ["", "s", "GB/s of models", "speed of `cp -r`", "of `cp -r`, sync", "GB/s moved", "peak GB", "GB written"]
    chain, out = rows["textbook, float32"], rows["out, float32"]
    minutes = 4 * 140e9 / results["bytes_of_models"] * rows["out, bfloat16"]["seconds"] / 60
    share = rows["in place, lines"]["written"] / rows["out, lines"]["written"]
    return markdown(heads, shown) + (
        f"\nThe textbook chain takes {chain['seconds'] / out['seconds']:.1f} times as long and "
        f"{chain['peak'] / out['peak']:.1f} times the memory. With 1 % of the lines selected,\nat random places, "
        f"a run in place writes {share:.2f} of what `--out` does, the journal included. At the rate of\n"
        f"`out, bfloat16` a family of 4 x 140 GB takes {minutes:.0f} minutes.\n\n"
        "The files of one model alone, cold, in pieces of 16 MB, written until they are on disk:\n\n"
        + markdown(
            ["GB/s", *HOW], [[what, *(f"{results['ways'][f'{what} {how}']:.2f}" for how in HOW)] for what in WHAT]
        )
    )


if __name__ == "__main__":
    main()
