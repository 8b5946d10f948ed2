"""New folders hold the bits of the textbook chain, whatever the shards, dtypes, memory and threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import Family, read_model, same, write_model

import fiun_fast as ff
from fiun_fast.checkpoints import unlearn, verify


@pytest.mark.parametrize("seed", range(6))
def test_the_bits_of_the_textbook_chain(tmp_path, seed):
    family = Family(tmp_path, seed, fisher_dtype=torch.float64 if seed == 4 else torch.float32, rounded=seed == 5)
    expected, counts = family.expected()
    memory = ["1GB", "900KB", "3MB"][seed % 3]
    result = unlearn(family.tree, out=tmp_path / "clean", memory=memory, threads=seed % 2 + 1)
    for name, tensors in expected.items():
        assert same(read_model(tmp_path / "clean" / name), tensors) == [], name
        assert result[name].selected == counts[name]
    if family.tree.merge == "max":
        in_memory = family.in_memory()
        assert all(same(in_memory[name], expected[name]) == [] for name in expected)
    assert result.selected > 0


MEASURED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch, fiun_fast as ff
from fiun_fast.checkpoints import ForgetEntry, ModelEntry, Tree, unlearn
from families import write_model
root = Path({root!r})
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def tree(kind):
    at = root / kind
    models = ModelEntry("a", at / "a", at / "i"), ModelEntry("b", at / "b", at / "i", ("a",))
    return Tree(models, (ForgetEntry("a", at / "f"),))
unlearn(tree("small"), out=root / "first", memory="16MB")  # what is loaded and made once
before = peak()
unlearn(tree("large"), out=root / "out", memory="16MB")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_below_its_limit(tmp_path):
    """Two models and two Fishers of 24 MB each, in 16 MB."""
    for kind, rows in (("small", 10), ("large", 3000)):
        tensors = {f"w{k}": torch.randn(rows, 500) for k in range(4)}
        for name in ("a", "b"):
            write_model(tmp_path / kind / name, tensors)
        for name in ("i", "f"):
            ff.Fisher.from_dict({key: torch.rand(rows, 500) for key in tensors}).save(tmp_path / kind / name)
    code = MEASURED.format(path=[str(Path(ff.__file__).parents[1]), str(Path(__file__).parent)], root=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 16e6
    assert verify(tmp_path / "out")
