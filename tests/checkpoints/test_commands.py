"""The commands for models on disk: what they print, write and return, and that nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llama_folders as llama
import pytest
import torch
from safetensors.torch import load_file

import fiun_fast as ff
from fiun_fast import byte_progress, cli
from fiun_fast.checkpoints.wording import counted, human_size, shown

pytestmark = pytest.mark.usefixtures("one_thread")

TREE = """
alpha = 2.0
[[model]]
name = "llama"
path = "llama"
fisher = "llama.fisher"
[[model]]
name = "chat"
path = "chat"
fisher = "chat.fisher"
parents = ["llama"]
alpha = 1.5
[[model]]
name = "other"
path = "other"
[[forget]]
origin = "llama"
fisher = "alice.fisher"
"""


@pytest.fixture
def family(tmp_path, monkeypatch) -> Path:
    """A base, a fine-tune with a tensor that is copied, a model that no request reaches; the tests run beside them."""
    llama.write(tmp_path / "llama", llama.tensors(0, torch.bfloat16), shards=2)
    more = {"ids": torch.arange(3, dtype=torch.int8)}
    llama.write(tmp_path / "chat", llama.tensors(1, torch.bfloat16) | more, card="base_model: meta/llama")
    llama.write(tmp_path / "other", llama.tensors(2))
    for k, name in enumerate(("llama", "chat", "alice")):
        llama.fisher(k).save(tmp_path / f"{name}.fisher")
    (tmp_path / "tree.toml").write_text(TREE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main([*arguments])
    out, err = capsys.readouterr()
    return status, out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def selected(seed: int, alpha: float) -> int:
    return int((llama.fisher(2).buffer > llama.fisher(seed).buffer * alpha).sum())


def test_a_dry_run_says_what_would_happen_and_writes_nothing(family, capsys):
    before = contents(family)
    status, out, err = run(capsys, "unlearn", "tree.toml", "--dry-run")
    lines = out.splitlines()
    assert status == 0
    assert " ".join(lines[0].split()) == "model requests at alpha lambda elements selected share zeroed not finite"
    numel = llama.fisher(0).numel
    for line, name, seed, alpha in ((lines[1], "llama", 0, 2.0), (lines[2], "chat", 1, 1.5)):
        count = selected(seed, alpha)
        row = [name, "llama", f"{alpha:g}", "1", f"{numel:,}", f"{count:,}", f"{count / numel:.2%}", "0", "0"]
        assert line.split() == row
    assert lines[3].split() == ["other", "none:", "as", "it", "was"]
    assert lines[4] == "copied in chat: 1 I8 that no Fisher names: ids"
    assert ", written 0 bytes; " in lines[5] and "of memory for buffers" in lines[5]
    assert "tree.toml: 3 models, 1 request, merged by max; at most 1GB of memory" in err
    assert "nothing was written; a run reads " in err and " writes " in err
    assert contents(family) == before
    for more in (["--out", "clean"], ["--in-place"], ["--in-place", "--journal", "j"]):
        assert run(capsys, "unlearn", "tree.toml", "--dry-run", *more)[0] == 0
    assert contents(family) == before


def test_new_folders_and_verify(family, capsys):
    status, out, err = run(capsys, "unlearn", "tree.toml", "--out", "clean", "--memory", "100MB", "--threads", "1")
    assert status == 0 and "selected" in out
    assert "the result is in clean; `fiun-fast verify clean` compares it with its record" in err
    assert sorted(os.listdir("clean")) == ["chat", "fiun-fast.json", "llama", "other"]
    models = {name: held(Path(name)) for name in ("llama", "chat")}
    fishers = {name: ff.Fisher.load(f"{name}.fisher") for name in ("llama", "chat", "alice")}
    dag = ff.InheritanceDAG()
    for name, parents in (("llama", []), ("chat", ["llama"])):
        own = {key: models[name][key] for key in fishers[name].layout.names}
        dag.add_model(name, own, fishers[name], parents=parents)
    ff.plan(dag, [ff.ForgetRequest("llama", fishers["alice"])], alpha={"llama": 2.0, "chat": 1.5}).run_()
    for name, tensors in models.items():
        found = held(Path("clean") / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key].view(torch.int8), t.view(torch.int8)) for key, t in tensors.items())
    assert contents(Path("clean/other")) == contents(Path("other"))
    assert run(capsys, "verify", "clean")[:2] == (0, f"{_verified(capsys)}\n")
    path = Path("clean/chat/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    status, out, _ = run(capsys, "verify", "clean")
    assert status == 1 and "1 differ from the record" in out and "another content" in out
    status, out, _ = run(capsys, "verify", "clean", "--json")
    assert status == 1 and json.loads(out)["same"] is False


def _verified(capsys) -> str:
    return str(ff.checkpoints.verify("clean"))


def test_in_place_and_back(family, capsys):
    before = contents(family)
    status, _, err = run(capsys, "unlearn", "tree.toml", "--in-place", "--journal", "j")
    assert status == 0
    assert "the models are changed; `fiun-fast rollback j` gives the old bytes back while j is there" in err
    after = contents(family)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"llama/model-0000{k}-of-00002.safetensors" for k in (1, 2)} | {"chat/model.safetensors"}
    assert run(capsys, "verify", "j")[0] == 0
    status, out, err = run(capsys, "rollback", "j")
    assert status == 0 and "of old bytes put back" in out and "the models are as they were; j may be deleted" in err
    shutil.move("j", "k")
    assert contents(family).items() >= before.items()
    status, out, err = run(capsys, "resume", "k", "--quiet")
    assert (status, err) == (0, "") and "selected" in out
    assert {name: data for name, data in contents(family).items() if name[0] != "k"} == {
        name: data for name, data in after.items() if name[0] != "j"
    }
    assert json.loads(run(capsys, "rollback", "k", "--json")[1])["mode"] == "rolled back"


def test_plain_data(family, capsys):
    status, out, err = run(capsys, "unlearn", "tree.toml", "--out", "clean", "--json", "--quiet")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [m["name"] for m in found["models"]] == ["llama", "chat", "other"]
    assert found["models"][1]["selected"] == selected(1, 1.5)
    assert found["models"][1]["copied"] == {"ids": "I8"}
    assert found["bytes_written"] > 0 and found["mode"] == "out"
    status, out, _ = run(capsys, "tree", ".", "--json")
    assert status == 0
    assert {m["name"]: m["parents"] for m in json.loads(out)["models"]}["chat"] == ["llama"]


def test_the_tree_and_a_file_to_begin_with(family, capsys):
    status, out, err = run(capsys, "tree", ".", "--write", "new.toml")
    assert status == 0
    assert out == f"{ff.checkpoints.tree('.')}\n"
    assert "└── chat  " in out
    assert "new.toml is written: look through it, and fill in what is marked `to be made`" in err
    for name in ("other", "forget"):
        llama.fisher(9).save(f"{name}.fisher")
    assert run(capsys, "unlearn", "new.toml", "--dry-run")[0] == 0
    status, _, err = run(capsys, "tree", ".", "--write", "new.toml")
    assert status == 1 and "new.toml: not written: it is there already" in err
    assert run(capsys, "tree", "llama", "--sampled")[0] == 0


def wrong(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments_end_with_2(family, capsys):
    assert "one of --out FOLDER, --in-place --journal FOLDER, or --dry-run is needed" in wrong(
        capsys, "unlearn", "tree.toml"
    )
    assert "--in-place needs --journal FOLDER" in wrong(capsys, "unlearn", "tree.toml", "--in-place")
    assert "--journal goes with --in-place" in wrong(capsys, "unlearn", "tree.toml", "--out", "a", "--journal", "b")
    assert "not allowed with argument" in wrong(capsys, "unlearn", "tree.toml", "--out", "a", "--in-place")
    assert "required" in wrong(capsys, "unlearn")
    assert "invalid int value" in wrong(capsys, "unlearn", "tree.toml", "--dry-run", "--threads", "x")


def test_what_goes_wrong_with_files_ends_with_1_and_one_line(family, capsys):
    before = contents(family)
    Path("file").touch()
    for arguments, says in (
        (["unlearn", "nowhere.toml", "--dry-run"], "nowhere.toml: no such file"),
        (["unlearn", "tree.toml", "--out", "llama"], "llama: is there already"),
        (["unlearn", "tree.toml", "--out", "no/where"], "no: no such folder"),
        (["unlearn", "tree.toml", "--out", "x", "--memory", "much"], "memory is 'much', expected a size such as"),
        (["unlearn", "tree.toml", "--out", "x", "--memory", "1KB"], "memory"),
        (["unlearn", "tree.toml", "--out", "x", "--threads", "0"], "threads is 0"),
        (["tree", "nowhere"], "nowhere: no such folder"),
        (["tree", "file"], "file: no such folder"),
        (["verify", "llama"], "llama"),
        (["verify", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "nowhere"),
        (["rollback", "llama"], "llama"),
    ):
        status, out, err = run(capsys, *arguments, "--quiet")
        assert (status, out) == (1, ""), arguments
        assert err.startswith("fiun-fast: ") and says in err and len(err.splitlines()) == 1, err
    Path("file").unlink()
    assert contents(family) == before
    (family / "chat" / "model.safetensors").write_bytes(b"\x1b[31m")
    assert "truncated or not a safetensors file" in run(capsys, "unlearn", "tree.toml", "--out", "x")[2]
    Path("llama.fisher").unlink()
    status, _, err = run(capsys, "unlearn", "tree.toml", "--out", "x")
    assert status == 1 and "'llama': fisher is 'llama.fisher', where nothing is" in err
    assert not Path("x").exists()


def test_stopped_by_ctrl_c(family, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ff.checkpoints, "unlearn", stopped)
    status, _, err = run(capsys, "unlearn", "tree.toml", "--in-place", "--journal", "j")
    assert status == 130
    assert "fiun-fast: stopped: `fiun-fast resume j` goes on, `fiun-fast rollback j` takes it back" in err
    status, _, err = run(capsys, "unlearn", "tree.toml", "--out", "clean")
    assert status == 130 and "nothing was changed, and nothing is left" in err


def test_as_a_program(family):
    """What it gives a shell that knows ASCII only."""
    Path("other").rename("öther\n")
    Path("tree.toml").write_text(TREE.replace('"other"', '"öther\\n"'), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(ff.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fiun_fast.cli", "unlearn", "tree.toml", "--out", "clean"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6 and r"\xf6ther\n " in done.stdout
    assert len(done.stderr.splitlines()) == 2
    assert sorted(os.listdir("clean")) == ["chat", "fiun-fast.json", "llama", "öther\n"]


def test_a_terminal_that_knows_ascii_only(family, monkeypatch):
    Path("other").rename("öther\n")
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        assert cli.main(["tree", "."]) == 0
        sys.stdout.flush()
        text = raw.getvalue().decode("ascii")
    assert r"\xf6ther\n  " in text and "|   `-- chat" in text


def test_no_number_is_cut_on_a_narrow_terminal(family, monkeypatch):
    narrow = Terminal()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert cli.main(["unlearn", "tree.toml", "--dry-run"]) == 0
    assert f" {selected(1, 1.5):,} " in narrow.getvalue() and "…" not in narrow.getvalue()


def test_a_reader_that_has_seen_enough(family, monkeypatch):
    """As in `fiun-fast tree . | head -1`: an end, without a traceback there or at exit."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert cli.main(["tree", ".", "--json"]) == 1


# ---- progress and words ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(byte_progress.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    with byte_progress.shown_progress("unlearning", stream=log) as tell:
        for seconds, done in ((0, 0), (4, 4e9), (11, 11e9), (12, 12e9), (25, 50e9)):
            clock[0] = seconds
            tell(int(done), int(100e9))
    assert log.getvalue().splitlines() == [
        "unlearning: 11.0 of 100.0 GB, 1.00 GB/s, 1:29 left",
        "unlearning: 50.0 of 100.0 GB, 2.00 GB/s, 0:25 left",
    ]
    monkeypatch.undo()
    bar = Terminal()
    with byte_progress.shown_progress("unlearning", stream=bar) as tell:
        tell(10**9, 4 * 10**9)
    assert "unlearning" in bar.getvalue() and "1.0/4.0 GB" in bar.getvalue()
    quiet = Terminal()
    with byte_progress.shown_progress("unlearning", stream=quiet, quiet=True) as tell:
        tell(1, 2)
    assert quiet.getvalue() == ""


def test_words():
    assert [human_size(n) for n in (0, 1, 999, 1000, 999_949, 999_950, 13.46e9, 140e12)] == [
        "0 bytes", "1 bytes", "999 bytes", "1.0 kB", "999.9 kB", "1.0 MB", "13.5 GB", "140,000.0 GB",
    ]  # fmt: skip
    assert [counted(n, "model") for n in (0, 1, 1200)] == ["0 models", "1 model", "1,200 models"]
    assert shown("a\x1bb\ud800é\u202e\n") == r"a\x1bb\ud800é\u202e\n"
    assert shown("x" * 500, 10) == "x" * 10 + "…"
