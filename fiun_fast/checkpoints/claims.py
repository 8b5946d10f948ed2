"""What the files beside a model say of where it came from: model card, adapter, merge recipe, configuration.

Anybody may have written them: whatever is in them, the result is a few strings, or a sentence that says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 1 << 22  # bytes that are read of a file
LARGEST_YAML = 1 << 15  # characters that are parsed, in two seconds at most
MOST = 64  # models that one may come from
LONGEST = 1000  # characters of a name

CARD, ADAPTER, CONFIG = "README.md", "adapter_config.json", "config.json"
MERGES = ("mergekit_config.yml", "mergekit_moe_config.yml")
_NULL = ("null", "Null", "NULL", "~")  # of YAML, which is read as strings
_MERGED = ("model", "base_model", "source_model")  # keys of a merge recipe that name a model, wherever they are


@dataclass(frozen=True)
class Claim:
    """A file says that a model came from another.

    Attributes:
        base: the other, as it is called there: a name on the hub, or a path.
        source: the file.
        relation: how, where that is said: "finetune", "adapter", "merge", "quantized".

    """

    base: str
    source: str
    relation: str = ""


class OddError(Exception):
    """A file of no use; the text says why."""


def read_claims(folder: Path) -> tuple[list[Claim], list[str]]:
    """All that the files of a folder say, the strongest first; and what is wrong with those that say nothing."""
    readers: dict[str, Callable[[Path], Iterator[Claim]]] = {CARD: _card, ADAPTER: _adapter}
    readers |= dict.fromkeys(MERGES, _merge) | {CONFIG: _config}
    found: dict[Claim, None] = {}
    odd = []
    for name, read in readers.items():
        path = folder / name
        try:
            if not path.is_symlink() and not path.exists():
                continue
            for claim in read(path):
                if len(claim.base) > LONGEST:
                    raise OddError(f"names a model by {len(claim.base):,} characters, expected at most {LONGEST:,}")
                found[claim] = None
                if len(found) > MOST:
                    raise OddError(f"names more than {MOST} models")
        except OddError as error:
            odd.append(f"{name}: {error}")
        except OSError as error:
            odd.append(f"{name}: cannot be read: {error.strerror or error}")
    return list(found), odd


def _text(path: Path) -> str:
    """The beginning of a text file, LARGEST bytes of it."""
    if not path.is_file():
        raise OddError("is no regular file, or a link to nothing")
    with path.open("rb") as file:
        data = file.read(LARGEST)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < LARGEST - 4:
            raise OddError(f"is not UTF-8 at byte {error.start:,}") from None
        return data[: error.start].decode("utf-8-sig")  # cut inside a character


def _yaml(text: str) -> Any:
    import yaml

    if len(text) > LARGEST_YAML:
        raise OddError(f"has {len(text):,} characters of YAML, expected at most {LARGEST_YAML:,}")
    try:
        # Strings, lists and tables only: no merge keys, which can double with every line, no dates, no objects. And in
        # Python, not by libyaml, which a text that is nested deeply enough brings down.
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise OddError(f"is no valid YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise OddError("is no valid YAML: nested too deeply") from None


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    if len(text) >= LARGEST:
        raise OddError(f"is larger than {LARGEST >> 20} MiB")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise OddError(f"is no valid JSON: {what}") from None
    if not isinstance(found, dict):
        raise OddError(f"is a JSON {type(found).__name__}, expected an object")
    return found


def _string(key: str, found: Any) -> str:
    """A string, or "" for null; an error for anything else."""
    if found is None:
        return ""
    if not isinstance(found, str):
        raise OddError(f"{key} is of type {type(found).__name__}, expected a string")
    return "" if found.strip() in _NULL else found.strip()


def _card(path: Path) -> Iterator[Claim]:
    """`base_model`, one or a list, and `base_model_relation`, of the YAML between the first two lines of dashes.

    Only these two are parsed: the rest of a card may be long.
    """
    lines = _text(path).split("\n")
    if lines[0].strip() != "---":
        return
    end = next((k for k, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), None)
    if end is None:
        raise OddError("its YAML head has no end")
    kept: list[str] = []
    inside = False
    for line in lines[1:end]:
        if re.match(r"[^\s#-]", line):
            inside = re.match(r"""(["']?)base_model(_relation)?\1\s*:""", line) is not None
        if inside:
            kept.append(line)
    found = _yaml("\n".join(kept)) if kept else {}
    if not isinstance(found, dict):
        raise OddError("its YAML head is no table")
    relation = _string("base_model_relation", found.get("base_model_relation"))
    bases = found.get("base_model")
    for base in bases if isinstance(bases, list) else [bases]:
        if name := _string("base_model", base):
            yield Claim(name, CARD, relation[:40])


def _adapter(path: Path) -> Iterator[Claim]:
    if name := _string("base_model_name_or_path", _json(path).get("base_model_name_or_path")):
        yield Claim(name, ADAPTER, "adapter")


def _config(path: Path) -> Iterator[Claim]:
    if name := _string("_name_or_path", _json(path).get("_name_or_path")):
        yield Claim(name, CONFIG)


def _merge(path: Path) -> Iterator[Claim]:
    """Every model of a merge recipe: in `models`, `slices`, `modules`, `experts`, and as `base_model`."""
    found = _yaml(_text(path))
    if not isinstance(found, dict):
        raise OddError("is no table")
    seen: set[int] = set()  # of containers: anchors make circles
    waiting: list[Any] = [found]
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, (dict, list)) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in _MERGED and isinstance(value, (str, dict)):
                yield from _merged(value, path.name)
            elif isinstance(value, (dict, list)):
                waiting.append(value)


def _merged(value: Any, source: str) -> Iterator[Claim]:
    """A model of a recipe: a name, `name+adapter`, or a table of these."""
    if isinstance(value, str):
        for name in value.split("+"):
            if name.strip():
                yield Claim(name.strip(), source, "merge")
        return
    inner = value.get("model"), value.get("lora")
    for one in (value.get("path"), *(i.get("path") if isinstance(i, dict) else i for i in inner)):
        if isinstance(one, str) and one.strip():
            yield Claim(one.strip(), source, "merge")
