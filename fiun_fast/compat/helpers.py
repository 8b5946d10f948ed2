"""The small functions that SSD's class carries along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fiun_fast.arguments import check_fraction

from .importances import flat_zeros


class Helpers:
    """Mixin: helpers as methods, as these classes have them."""

    device: Any

    def get_layer_num(self, layer_name: str) -> int:
        """The number in the second part of a parameter's name ("layer4.1.conv1.weight": 1), else -1."""
        parts = layer_name.split(".")
        return int(parts[1]) if len(parts) > 1 and parts[1].isnumeric() else -1

    def zerolike_params_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Zeros like each parameter, views of one flat buffer: sums kept there take the fast path."""
        return flat_zeros(dict(model.named_parameters()))

    def fulllike_params_dict(self, model: nn.Module, fill_value: float, as_tensor: bool = False) -> dict[str, Any]:
        """Each parameter's shape filled with a value: nested lists, or with `as_tensor` tensors on the device."""
        if as_tensor:
            return {name: torch.full(p.shape, fill_value, device=self.device) for name, p in model.named_parameters()}
        return {name: _nested(fill_value, p.shape) for name, p in model.named_parameters()}

    def subsample_dataset(self, dataset: Dataset, sample_perc: float) -> Subset:
        """Every k-th sample, k = int(1 / sample_perc).

        Raises:
            ArgumentError: `sample_perc` is outside (0, 1].

        """
        fraction = check_fraction("sample_perc", sample_perc, "a fraction in (0, 1]")
        return Subset(dataset, list(range(0, len(dataset), int(1 / fraction))))  # type: ignore[arg-type]

    def split_dataset_by_class(self, dataset: Dataset) -> list[Subset]:
        """One subset for each class, in the order of the labels; the label is the last part of a sample."""
        found: dict[int, list[int]] = {}
        for index in range(len(dataset)):  # type: ignore[arg-type]
            found.setdefault(int(dataset[index][-1]), []).append(index)
        return [Subset(dataset, found[label]) for label in sorted(found)]


def _nested(value: float, shape: Sequence[int]) -> Any:
    return [_nested(value, shape[1:]) for _ in range(shape[0])] if len(shape) else value
