"""New folders hold the bits of the textbook chain, whatever the shards, dtypes, memory and threads."""

from __future__ import annotations

import pytest
import torch
from families import Family, read_model, same

from fiun_fast.checkpoints import unlearn


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
