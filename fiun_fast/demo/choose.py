"""What the demo's `ff.tune` maximises, node by node, on validation data alone.

Grid         that of `ff.tune`: lambda in {1, 0.1, 0.01}; alpha so that the selected share runs from one element to 70 %
             in even steps of its logarithm.
Objective    forgotten + max(0, fall of rest) + 0.1 * sure_forgotten - 0.02 * sure_rest, the least wins, where
             `forgotten` and `rest` are accuracies on the classes to forget and on the others, and `sure_*` the mean
             probability given to the true label. The last two only break ties, towards a margin: many candidates reach
             the same accuracies, and the one that has just crossed the line on validation data fails on new data.

The rule is the same for every node, class, network and seed. docs/choosing.md compares it with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import fiun_fast as ff


class Snapshot:
    """The parameters that dampening may write, to put them back after a measurement."""

    def __init__(self, models: Mapping[str, nn.Module], params: Sequence[str]) -> None:
        self._saved = [
            (parameter, parameter.detach().clone())
            for model in models.values()
            for parameter in map(model.get_parameter, params)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the parameters back."""
        for parameter, value in self._saved:
            parameter.copy_(value)


class Trial:
    """Scores one node on its validation data.

    tail maps inputs [n, ...] to logits [n, classes]: the part of the model that dampening can reach.
    """

    def __init__(self, tail: nn.Module, inputs: Tensor, labels: Tensor, forget: Sequence[int]) -> None:
        self._tail, self._inputs, self._labels = tail, inputs, labels
        self._forgotten = torch.isin(labels, torch.tensor(forget, device=labels.device))
        self._rest_before = self._measure()[1]

    @torch.no_grad()
    def _measure(self) -> tuple[float, float, float, float]:
        """Accuracy on forgotten and rest, then the mean probability of the true label on each."""
        logits = self._tail(self._inputs)
        right = (logits.argmax(1) == self._labels).float()
        sure = logits.softmax(1).gather(1, self._labels[:, None])[:, 0]
        both = torch.stack([right, sure])
        parts = [both[:, self._forgotten].mean(1), both[:, ~self._forgotten].mean(1)]
        (forgotten, sure_forgotten), (rest, sure_rest) = (part.nan_to_num(0.0).tolist() for part in parts)
        return forgotten, rest, sure_forgotten, sure_rest

    def score(self) -> float:
        """The objective for the model as it is now, negated: higher is better."""
        forgotten, rest, sure_forgotten, sure_rest = self._measure()
        return -(forgotten + max(0.0, self._rest_before - rest) + 0.1 * sure_forgotten - 0.02 * sure_rest)


def compile_plan(
    dag: ff.InheritanceDAG, requests: Sequence[ff.ForgetRequest], choices: Mapping[str, ff.Choice], backend: str | None
) -> ff.Plan:
    """A plan that dampens every node with its own alpha and lambda."""
    return ff.plan(
        dag,
        requests,
        alpha={node: choice.alpha for node, choice in choices.items()},
        lam={node: choice.lam for node, choice in choices.items()},
        backend=backend,
    )
