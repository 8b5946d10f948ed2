"""Which tensor on disk a name in a Fisher means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import CheckpointError, LayoutError
from ..naming import matched, near
from ..wrappers import plain_name
from .entries import ModelEntry
from .folder import ADAPTER_CONFIG, Weights

# in memory PEFT's parameters have the adapter's name in theirs, in its files they have not
_ADAPTER = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$)[^.]+")
_INPUTS = (".embed_tokens.weight", ".wte.weight", ".word_embeddings.weight", ".embed_in.weight")  # tied with an lm_head


def match(model: ModelEntry, names: Iterable[str], weights: Weights) -> dict[str, str]:
    """Name in a Fisher -> name on disk, for all names that differ.

    The table `rename` says first; then a name as it stands; then the one tensor that differs in what wrappers add, in a
    leading `model.`, in an adapter's name, or is tied with the one that is meant: by the file's own metadata, or by
    `tie_word_embeddings` of config.json.

    Raises:
        LayoutError: a name for which there is no tensor, with near names; or two names for one tensor.
        CheckpointError: `rename` names a tensor that is not there.

    """
    wanted = list(names)
    found = {name: model.rename[name] for name in wanted if name in model.rename}
    for name, disk in found.items():
        if disk not in weights:
            raise CheckpointError(
                f"model {model.name!r}: rename gives {disk!r} for {name!r}, and {weights.root} has no such tensor"
                f"{near(disk, weights)}"
            )
    left = [name for name in wanted if name not in found]
    ties = _ties(weights)
    taken = set(found.values()) | {name for name in left if name in weights}
    free = [name for name in weights if name not in taken]
    for meaning in (plain_name, _bare):
        missing = [name for name in left if name not in weights and name not in found]
        means = {name: meaning(name) for name in (*missing, *free)}
        for tied, kept in ties.items():
            means[tied] = means[meaning(tied)] = meaning(kept)
        found |= matched(missing, free, means)
        taken |= set(found.values())
        free = [name for name in free if name not in taken]
    owner: dict[str, str] = {}
    for name in wanted:
        disk = found.get(name, name)
        if disk not in weights:
            raise LayoutError(
                f"model {model.name!r}: no tensor {name!r} in {weights.root}, its Fisher has one{near(name, weights)}; "
                "a table [model.rename] says which one is meant: its name in the Fisher = its name on disk"
            )
        if owner.setdefault(disk, name) != name:
            raise LayoutError(
                f"model {model.name!r}: {owner[disk]!r} and {name!r} of its Fisher both mean {disk!r} in {weights.root}"
            )
    return found


def _bare(name: str) -> str:
    return _ADAPTER.sub(r"\1", plain_name(name)).removeprefix("model.")


def _ties(weights: Weights) -> dict[str, str]:
    """Name of a tensor that is not there -> name of the one that it is tied with."""
    ties = {
        tied: kept
        for header in weights.headers
        for tied, kept in header.metadata.items()
        if kept in weights and tied not in weights
    }
    if not weights.json("config.json").get("tie_word_embeddings") or (weights.root / ADAPTER_CONFIG).exists():
        return ties
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    inputs = [name for name in weights if f".{name}".endswith(_INPUTS)]
    if not heads and len(inputs) == 1:
        ties["lm_head.weight"] = inputs[0]
    if len(heads) == 1 and not inputs:
        ties |= dict.fromkeys((f"model{name}" for name in _INPUTS), heads[0])
    return ties
