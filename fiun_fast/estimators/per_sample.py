"""Per-sample gradients for what has no closed form: torch.func in chunks, else one sample after another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from .claims import Shared
from .job import Job, is_cut, per_sample, take
from .raised import RaisedError
from .rounds import Round
from .totals import Totals

CHUNK_BYTES = 64 << 20  # per-sample gradients held at a time
VMAP, LOOP = "per-sample gradients, torch.func", "per-sample gradients, one by one"


def _silence() -> warnings.catch_warnings:
    before = warnings.catch_warnings()
    before.__enter__()
    warnings.filterwarnings("ignore", "There is a performance drop")  # still right, and still a batch
    return before


_quiet = Shared(_silence, lambda before: before.__exit__(None, None, None))


def _loss(job: Job, batch: Any, round_: Round | None) -> Tensor:
    outputs, targets = job.forward(batch)
    return weighted(job, outputs, targets, round_).sum()


@contextmanager
def _in_place_of(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Tensors instead of parameters (by id), in every module once.

    `torch.func.functional_call` goes by names: of a module that has two it keeps the tensors instead of the parameters.
    """
    before: list[tuple[Any, Any, Any]] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and any(
            id(p) in tensors for p in module.parameters(recurse=False)
        ):
            raise TypeError("a scripted module keeps its own parameters")
        lists = [value for value in vars(module).values() if type(value) is list]  # where recurrent layers look
        for held in (module._parameters, *lists):
            places = list(held.items() if isinstance(held, dict) else enumerate(held))
            before += [(held, key, p) for key, p in places if id(p) in tensors]
    try:
        for held, key, p in before:
            held[key] = tensors[id(p)]
        yield
    finally:
        for held, key, p in before:
            held[key] = p


def weighted(job: Job, outputs: Any, targets: Any, round_: Round | None) -> Tensor:
    """Per-sample losses [B], with assumed labels and factors where a round says so."""
    return per_sample(job, outputs, targets) if round_ is None else round_.losses(outputs)


class PerSample:
    """Adds squared per-sample gradients of some parameters; after vmap has failed once, it is not tried again."""

    def __init__(self, job: Job, totals: Totals) -> None:
        self._job, self._totals = job, totals
        self.refused: str | None = None  # why torch.func cannot do it

    def add(self, batch: Any, samples: int, names: Sequence[str], rounds: Sequence[Round | None]) -> str:
        """Add sum_n g_n^2 of these parameters over the batch, for every round; returns how it was done."""
        if self.refused is None and samples > 1:
            try:
                with torch.no_grad(), _quiet:
                    sums: dict[str, Tensor] = {}
                    for round_ in rounds:
                        self._by_vmap(batch, samples, names, round_, sums)
            except Exception as error:  # many kinds: no batching rule, data-dependent control flow, in-place writes
                cause = error.__cause__ or error if isinstance(error, RaisedError) else error
                first = str(cause).strip().partition("\n")[0].partition(". ")[0]
                self.refused = f"{type(cause).__name__}: {first[:80]}"
            else:
                for name, square in sums.items():
                    self._totals.views[name] += square
                return VMAP
        for p in self._job.selected.values():  # all: reentrant checkpointing needs an input that requires grad
            p.requires_grad_(True)
        for round_ in rounds:
            self._by_loop(batch, samples, names, round_)
        return f"{LOOP} (torch.func refused, {self.refused})" if self.refused else LOOP

    def _by_vmap(
        self, batch: Any, samples: int, names: Sequence[str], round_: Round | None, sums: dict[str, Tensor]
    ) -> None:
        """Add sums over the batch to `sums`, not yet to the total: vmap may fail half way."""
        job = self._job
        chosen = {name: job.selected[name].detach() for name in names}
        each = sum(p.numel() * p.element_size() for p in chosen.values())
        chunk = min(samples, max(1, CHUNK_BYTES // max(1, each)))
        leaves, tree = pytree.tree_flatten((batch, round_))
        mapped = [i for i, leaf in enumerate(leaves) if is_cut(leaf, samples)]

        def loss(parameters: dict[str, Tensor], *cut: Tensor) -> Tensor:
            filled = list(leaves)
            for i, leaf in zip(mapped, cut, strict=True):
                filled[i] = leaf.unsqueeze(0)
            one, its_round = pytree.tree_unflatten(filled, tree)
            with _in_place_of(job.model, {id(job.selected[name]): p for name, p in parameters.items()}):
                return _loss(job, one, its_round)

        gradient = vmap(grad(loss), in_dims=(None, *[0] * len(mapped)))
        for at in range(0, samples, chunk):
            found = gradient(chosen, *(leaves[i][at : at + chunk] for i in mapped))
            for name in names:
                square = self._totals.number(found[name]).square().sum(0)
                sums[name] = sums[name] + square if name in sums else square

    def _by_loop(self, batch: Any, samples: int, names: Sequence[str], round_: Round | None) -> None:
        for n in range(samples):
            one = slice(n, n + 1)
            alone = None if round_ is None else round_.take(one)
            self.add_gradients(_loss(self._job, take(batch, one, samples), alone), names)

    def add_gradients(self, loss: Tensor, names: Sequence[str], keep_graph: bool = False) -> None:
        """Add the squares of one sample's gradients."""
        if not loss.requires_grad:
            return
        gradients = backward(loss, self._job.selected, keep_graph)
        if found := {name: g for name, g in gradients.items() if g is not None and name in names}:
            self._totals.add(found)


def backward(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], keep_graph: bool = False
) -> dict[str, Tensor | None]:
    """Gradients with respect to these parameters, whose .grad is None before and after.

    Not by torch.autograd.grad: reentrant checkpointing refuses that, and a watch would not see a recomputation in it.
    """
    torch.autograd.backward([loss], retain_graph=keep_graph)
    found = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found
