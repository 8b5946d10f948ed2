"""Has a model changed since, outside the part that may change? Asked before what was computed of it is used again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .homes import Homes, all_held

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
AT_ONCE = 1 << 22  # of which a sum makes copies
_LEFT_OUT = {"training", "_parameters", "_buffers", "_modules"}  # modes are set and put back by whoever looks


class Watched:
    """A model's parameters, buffers, submodules, hooks and attributes as they are now.

    Tensors are told by where they live and by autograd's version counters, everything else by identity. What is written
    to a tensor past its counter (`p.data.add_`) is noticed by `rewritten` alone, which reads them; a change inside a
    list or dict of a module is not. With `bits`, a tensor that was written to and has its old bits is as before.

    Args:
        model: any.
        inside: a submodule that is not looked into; a tensor that others have too is watched all the same.
        free: ids of tensors that may be written to; that they are replaced or moved is noticed.
        bits: sum up what is in the tensors, for `rewritten` and `written`.

    """

    def __init__(
        self, model: nn.Module, inside: nn.Module | None = None, free: Collection[int] = (), *, bits: bool = False
    ) -> None:
        hidden = set() if inside is None else {id(module) for module in inside.modules()}
        self._homes, self._sizes = Homes(), list[tuple[Mapping[Any, Any], int]]()
        self._held: tuple[list[Any], list[str], list[Any]] = [], [], []
        counted: list[Tensor] = []
        odd = False  # sparse, quantised, nested, conjugated: whether such a tensor has changed cannot be told
        for module in model.modules():
            if id(module) in hidden:
                continue
            for own in (module._parameters, module._buffers):
                every = {key: tensor for key, tensor in own.items() if tensor is not None}
                there = {key: tensor for key, tensor in every.items() if _is_plain(tensor)}
                odd = odd or len(there) < len(every)
                self._homes.add([own] * len(there), list(there), list(there.values()))
                counted += [tensor for tensor in there.values() if id(tensor) not in free]
            attributes = vars(module)
            self._hold(module._modules, list(module._modules))
            self._hold(attributes, [key for key in attributes if key not in _LEFT_OUT])
            self._sizes += [
                (own, len(own)) for own in (module._modules, module._parameters, module._buffers, attributes)
            ]
            for hooks in (getattr(module, name) for name in _HOOKS):
                self._hold(hooks, list(hooks))
                self._sizes.append((hooks, len(hooks)))
        self._tensors = list({id(tensor): tensor for tensor in counted}.values())
        self.sure = not odd and not any(tensor.is_inference() for tensor in self._tensors)  # those have no counter
        self._versions = [tensor._version for tensor in self._tensors] if self.sure else []
        self._homes.settle()
        self._sums = self._sum_up() if bits else []

    def _sum_up(self) -> list[tuple[int, int]]:
        return [_sums(tensor) for tensor in self._tensors]

    def _hold(self, container: Mapping[str, Any], keys: list[str]) -> None:
        containers, names, objects = self._held
        containers += [container] * len(keys)
        names += keys
        objects += [container[key] for key in keys]

    def rebuilt(self) -> bool:
        """Whether anything was replaced, added, taken away or moved; or whether that cannot be told."""
        return (
            not self.sure
            or any(len(own) != size for own, size in self._sizes)
            or self._homes.moved()
            or not all_held(*self._held)
        )

    def written(self) -> list[Tensor]:
        """The tensors that were written to."""
        now = [tensor._version for tensor in self._tensors]
        if now == self._versions:
            return []
        moved = [k for k, pair in enumerate(zip(now, self._versions, strict=True)) if pair[0] != pair[1]]
        found = [k for k in moved if not self._sums or _sums(self._tensors[k]) != self._sums[k]]
        if not found:  # a trial that was taken back
            self._versions = now
        return [self._tensors[k] for k in found]

    def rewritten(self) -> bool:
        """Whether any of their bits changed, past their counters too; reads all of them."""
        return self._sum_up() != self._sums

    def changed(self) -> bool:
        """Either of the first two."""
        return self.rebuilt() or bool(self.written())


def _is_plain(tensor: Tensor) -> bool:
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or lazy)


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Of what is in it as whole numbers, plain and weighted by place: the first alone is that of any order of them."""
    plain = tensor.detach()
    if plain.is_meta or plain.numel() == 0:
        return 0, 0
    flat = (plain if plain.is_contiguous() else plain.contiguous()).view(-1)
    kind = next((kind for kind in (torch.int64, torch.int32) if _fits(flat, kind)), torch.uint8)
    total, weighted = 0, 0
    for part in flat.view(kind).split(AT_ONCE):
        whole = part.long()
        total += int(whole.sum())
        weighted = 31 * weighted + int((whole * torch.arange(1, 2 * len(whole), 2, device=whole.device)).sum())
    return total, weighted


def _fits(flat: Tensor, kind: torch.dtype) -> bool:
    """Whether its bytes are whole numbers of that kind, at addresses for them."""
    size = kind.itemsize
    return flat.nbytes % size == 0 and flat.storage_offset() * flat.itemsize % size == 0
