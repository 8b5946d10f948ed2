"""The rule by which the demo chooses alpha and lambda, node by node, on validation data alone.

Candidates   lambda in {1, 0.1, 0.01}; alpha at quantiles of m / I over the node's own scope, so that the selected share
             runs from one element to 70 % of them in even steps of its logarithm.
Objective    forgotten + max(0, fall of rest) + 0.1 * sure_forgotten - 0.02 * sure_rest, the least wins, where
             `forgotten` and `rest` are accuracies on the classes to forget and on the others, and `sure_*` the mean
             probability given to the true label. The last two only break ties, towards a margin: many candidates reach
             the same accuracies, and the one that has just crossed the line on validation data fails on new data.

The rule is the same for every node, class, network and seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fiun_fast as ff

LAMBDAS = (1.0, 0.1, 0.01)


@dataclass(frozen=True)
class Choice:
    """What a node is dampened with."""

    alpha: float
    lam: float


class Snapshot:
    """The parameters that dampening may write, to put them back after a trial."""

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


def candidates(merged: Tensor, original: Tensor, points: int) -> Iterator[Choice]:
    """The grid of one node from its merged forget Fisher m and original Fisher I, both [numel]."""
    ratio = merged / original
    ratio = ratio[torch.isfinite(ratio) & (ratio > 0)].sort(descending=True).values
    if not len(ratio):  # the forget data left no trace here: nothing to select, whatever alpha
        ratio = torch.ones(1)
    shares = torch.logspace(-torch.tensor(float(len(ratio))).log10().item(), -0.155, points)  # 1 element ... 70 %
    alphas = ratio[(shares * len(ratio)).long().clamp(max=len(ratio) - 1).to(ratio.device)]
    for lam in LAMBDAS:
        for alpha in alphas.tolist():
            yield Choice(alpha, lam)


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

    def cost(self) -> float:
        """The objective for the model as it is now; lower is better."""
        forgotten, rest, sure_forgotten, sure_rest = self._measure()
        return forgotten + max(0.0, self._rest_before - rest) + 0.1 * sure_forgotten - 0.02 * sure_rest


def choose(
    dag: ff.InheritanceDAG,
    requests: Sequence[ff.ForgetRequest],
    grids: Mapping[str, Sequence[Choice]],
    trials: Mapping[str, Trial],
    snapshot: Snapshot,
    backend: str | None = None,
) -> dict[str, Choice]:
    """Return the best candidate of every node; the models are as before afterwards.

    One `run_` tries the k-th candidate of all nodes at once: no node waits for another.
    """
    best = {node: (float("inf"), grid[0]) for node, grid in grids.items()}
    for k in range(max(map(len, grids.values()))):
        tried = {node: grid[min(k, len(grid) - 1)] for node, grid in grids.items()}
        compile_plan(dag, requests, tried, backend).run_()
        for node, choice in tried.items():
            best[node] = min(best[node], (trials[node].cost(), choice), key=lambda found: found[0])
        snapshot.restore()
    return {node: choice for node, (_, choice) in best.items()}


def compile_plan(
    dag: ff.InheritanceDAG, requests: Sequence[ff.ForgetRequest], choices: Mapping[str, Choice], backend: str | None
) -> ff.Plan:
    """A plan that dampens every node with its own alpha and lambda."""
    return ff.plan(
        dag,
        requests,
        alpha={node: choice.alpha for node, choice in choices.items()},
        lam={node: choice.lam for node, choice in choices.items()},
        backend=backend,
    )
