"""Several ranks over gloo, forked by one process: 2, then 3, then 4 of them run all cases of `spread_cases.py`.

    python spread_work.py FOLDER [WORLD …]

Each rank writes FOLDER/<world>-<rank>.json, {case: "" or what went wrong}. What comes after a case that went wrong is
not run: ranks that have lost step would wait for one another.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import spread_cases
import torch
import torch.distributed as dist

WORLDS = (2, 3, 4)


def work(folder: Path, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    results: dict[str, str] = {}
    times: dict[str, float] = {}
    for name, case in spread_cases.cases(world).items():
        begun = time.process_time()
        try:
            case(folder)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        times[name] = time.process_time() - begun
        (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
        if results[name]:
            break
    (folder / f"{world}-{rank}.times.json").write_text(json.dumps(times))


def main(folder: Path, worlds: tuple[int, ...]) -> None:
    for world in worlds:
        children = []
        for rank in range(world):
            if (child := os.fork()) == 0:
                try:
                    work(folder, world, rank)
                finally:
                    os._exit(0)  # also after a case in which a rank has died
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(map(int, sys.argv[2:])) or WORLDS)
