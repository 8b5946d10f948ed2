"""docs/checkpoints.md as a reader would follow it: its Python, its commands, its TOML file, and what they print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import fiun_fast as ff
from fiun_fast import cli
from fiun_fast.checkpoints import tree_file

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
EXAMPLE = PAGE[PAGE.index("## A worked example") : PAGE.index("## The TOML file")]


def plain(line: str) -> str:
    """A printed line without what differs from machine to machine: times and sizes of a run."""
    line = line.rstrip()
    return re.sub(r"[\d.]+ (s|bytes|[kMG]B)\b", r"N \1", line) if "for buffers" in line else line


def test_the_worked_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"ff": ff, "torch": torch}
    printed, ran = "", []
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", EXAMPLE, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(compile(text, "docs/checkpoints.md", "exec"), names)
            capsys.readouterr()
        elif kind == "sh":
            for line in text.splitlines():
                ran.append(line)
                assert cli.main(shlex.split(line)[1:]) == 0, line
            printed = capsys.readouterr().out
        elif kind == "toml":
            assert [
                m["name"] for m in tree_file.tomllib.loads(Path("tree.toml").read_text(encoding="utf-8"))["model"]
            ] == [m["name"] for m in tree_file.tomllib.loads(text)["model"]]
            Path("tree.toml").write_text(text, encoding="utf-8")
        else:
            assert [plain(line) for line in printed.splitlines()] == [plain(line) for line in text.splitlines()]
    assert len(ran) == 6
    assert "fiun-fast rollback j" in ran


def test_every_key_of_the_toml_file_is_on_the_page():
    table = PAGE[PAGE.index("| table | key |") : PAGE.index("A model needs no Fisher")]
    for key in {*tree_file.TOP, *tree_file.MODEL, *tree_file.FORGET} - {"model", "forget"}:
        assert f"`{key}`" in table or f"[{key}]" in table, key
    assert "`[[model]]`" in table and "`[[forget]]`" in table


def test_every_command_on_the_page_is_one():
    for line in re.findall(r"^(fiun-fast .*?)(?:\s+#.*)?$", PAGE, re.MULTILINE):
        for command in line.split(" ; "):
            options = cli.parser().parse_args(shlex.split(command)[1:])
            assert callable(options.run)
