"""Has a model changed since, outside the part that may change? Asked before what was computed of it is used again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .homes import Homes, all_held

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LEFT_OUT = {"training", "_parameters", "_buffers", "_modules"}  # modes are set and put back by whoever looks


class Watched:
    """A model's parameters, buffers, submodules, hooks and attributes as they are now.

    Tensors are told by where they live and by autograd's version counters, everything else by identity. What is written
    to a tensor past its counter (`p.data.add_`) is noticed by `rewritten` alone, which reads them; a change inside a
    list or dict of a module is not.

    Args:
        model: any.
        inside: a submodule that is not looked into; a tensor that others have too is watched all the same.
        free: ids of tensors that may be written to; that they are replaced or moved is noticed.
        bits: sum up what is in the tensors, for `rewritten`.

    """

    def __init__(
        self, model: nn.Module, inside: nn.Module | None = None, free: Collection[int] = (), *, bits: bool = False
    ) -> None:
        hidden = set() if inside is None else {id(module) for module in inside.modules()}
        self._homes, self._sizes = Homes(), list[tuple[Mapping[Any, Any], int]]()
        self._held: tuple[list[Any], list[str], list[Any]] = [], [], []
        counted: list[Tensor] = []
        for module in model.modules():
            if id(module) in hidden:
                continue
            for own in (module._parameters, module._buffers):
                there = {key: tensor for key, tensor in own.items() if tensor is not None}
                self._homes.add([own] * len(there), list(there), list(there.values()))
                counted += [tensor for tensor in there.values() if id(tensor) not in free]
            attributes = vars(module)
            self._hold(module._modules, list(module._modules))
            self._hold(attributes, [key for key in attributes if key not in _LEFT_OUT])
            every = (module._modules, module._parameters, module._buffers, attributes)
            self._sizes += [(own, len(own)) for own in every]
            self._sizes += [(hooks, len(hooks)) for hooks in (getattr(module, name) for name in _HOOKS)]
        self._tensors = list({id(tensor): tensor for tensor in counted}.values())
        self.sure = not any(tensor.is_inference() for tensor in self._tensors)  # those have no counter
        self._versions = [tensor._version for tensor in self._tensors] if self.sure else []
        self._homes.settle()
        self._sums = self._sum_up() if bits else []

    def _sum_up(self) -> list[int]:
        return [int(_bytes(tensor).sum(dtype=torch.int64)) for tensor in self._tensors]

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
        return [t for t, one, before in zip(self._tensors, now, self._versions, strict=True) if one != before]

    def rewritten(self) -> bool:
        """Whether any of their bits changed, past their counters too; reads all of them."""
        return self._sum_up() != self._sums

    def changed(self) -> bool:
        """Either of the first two."""
        return self.rebuilt() or bool(self.written())


def _bytes(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if plain.layout != torch.strided or plain.is_meta or plain.is_quantized:  # what is in them cannot be summed up
        return torch.zeros(0)
    plain = plain if plain.is_contiguous() else plain.contiguous()
    flat = plain.view(-1)
    return flat.view(next((kind for kind in (torch.int64, torch.int32) if _fits(flat, kind)), torch.uint8))


def _fits(flat: Tensor, kind: torch.dtype) -> bool:
    """Whether its bytes are whole numbers of that kind, at addresses for them."""
    size = kind.itemsize
    return flat.nbytes % size == 0 and flat.storage_offset() * flat.itemsize % size == 0
