"""One compiled program, bound to memory of another kind: window after window gives the bits and counts of the whole."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import DIAMOND, SIZES, Case, build, textbook

import fiun_fast as ff
from fiun_fast.binding import bind
from fiun_fast.compiling import compile_program, reached_nodes
from fiun_fast.kernels.table import Merging
from fiun_fast.values import Slots, Values


@dataclass
class Line:
    """A parameter as a file's header has it: no tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Window:
    """Elements [start, stop) of each parameter named; copies, as a file's window would be, written back by `flush`."""

    def __init__(self, problem, nodes, ranges: dict[str, tuple[int, int]]) -> None:
        self._problem, self._nodes, self._ranges = problem, nodes, ranges
        self._layout = ff.Layout({name: (stop - start,) for name, (start, stop) in ranges.items()})
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _part(self, fisher: ff.Fisher) -> ff.Fisher:
        pieces = [fisher[name].reshape(-1)[start:stop] for name, (start, stop) in self._ranges.items()]
        return ff.Fisher(torch.cat(pieces), self._layout)

    def originals(self, nodes) -> list[ff.Fisher]:
        return [self._part(self._problem.originals[self._nodes[i].name]) for i in nodes]

    def forget(self, request: int, device: torch.device) -> ff.Fisher:
        return self._part(self._problem.forgets[request]).to(device)

    def gradient(self, request: int, device: torch.device) -> ff.Gradient:
        whole = self._problem.gradients[request]
        pieces = [whole[name].reshape(-1)[start:stop] for name, (start, stop) in self._ranges.items()]
        return ff.Gradient(torch.cat(pieces), self._layout).to(device)

    def thetas(self, nodes, names) -> list[list[torch.Tensor]]:
        return [[self._theta(self._nodes[i].name, name) for i in nodes] for name in names]

    def _theta(self, node: str, name: str) -> torch.Tensor:
        start, stop = self._ranges[name]
        whole = self._problem.models[node][name].view(-1)[start:stop]
        self._written.append((whole, whole.clone()))
        return self._written[-1][1]

    def flush(self) -> None:
        for whole, copy in self._written:
            whole.copy_(copy)


WINDOWS = [
    {"scalar": (0, 1), "odd": (0, 5)},
    {"odd": (5, 21), "line": (3, 16), "prime": (0, 1)},
    {"line": (0, 3), "one": (0, 1), "over": (0, 17), "prime": (1, 700)},
    {"prime": (700, 1009)},
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("theta", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
def test_windows_add_up(backend, theta, signed):
    if backend not in ff.available_backends():
        pytest.skip(f"backend {backend} cannot be used here")
    problem = build(Case("windows", DIAMOND, ("a", "b"), shapes=SIZES, theta=theta, values="edges", signed=signed))
    expected = textbook(problem)
    dag = ff.InheritanceDAG()
    for name, parents in problem.case.parents.items():
        dag.add_model(name, problem.models[name], problem.originals[name], parents=parents)
    given = zip(problem.case.origins, problem.forgets, problem.gradients, strict=True)
    requests = [ff.ForgetRequest(o, f, gradient=g) for o, f, g in given]
    nodes = reached_nodes(dag, requests)

    def describe(nodes, names):
        return [[Line(SIZES[name], theta, torch.device("cpu")) for _ in nodes] for name in names]

    program = compile_program(nodes, requests, "error", describe)
    how = Values.of(nodes, dag, torch.float32, 1.5, 0.7).dampening(Slots.plain(len(nodes)), 1.0, 1.0)
    counts = torch.zeros(len(nodes), 3, dtype=torch.int64)
    for ranges in WINDOWS:
        window = Window(problem, nodes, ranges)
        for part in bind(program, window, Merging(), how, backend):
            part.launch.run(counts)
        window.flush()
    state = problem.state()
    for key, value in expected.values.items():
        kind = {4: torch.int32, 2: torch.int16}[value.itemsize]
        nan = value.isnan()
        assert torch.equal(state[key].isnan(), nan), key
        assert torch.equal(state[key].masked_fill(nan, 0).view(kind), value.masked_fill(nan, 0).view(kind)), key
    found = {node.name: tuple(row) for node, row in zip(nodes, counts.tolist(), strict=True)}
    assert found == {name: expected.counts[name] for name in found}
    assert len(found) == 4


def test_a_program_knows_no_memory():
    """What is wrong with names, shapes, dtypes and devices is found without a tensor."""
    layout = ff.Layout({"w": (2, 3)})
    fisher = ff.Fisher(torch.rand(6), layout)
    dag = ff.InheritanceDAG()
    dag.add_model("a", {}, fisher)
    requests = [ff.ForgetRequest("a", fisher)]
    nodes = reached_nodes(dag, requests)
    for line, error, message in [
        (None, ff.LayoutError, "node 'a': the model has no parameter 'w', its original Fisher has"),
        (Line((3, 2), torch.float32, torch.device("cpu")), ff.LayoutError, r"shape \[3, 2\] in the model, \[2, 3\]"),
        (Line((2, 3), torch.int8, torch.device("cpu")), ff.DTypeError, "int8, expected float32, float64, bfloat16 or"),
        (Line((2, 3), torch.float32, torch.device("cuda:1")), ff.DeviceError, "on cuda:1, its original Fisher on cpu"),
        (Line((2, 3), torch.float32, torch.device("meta")), ff.DeviceError, "offloaded or were never loaded"),
    ]:
        with pytest.raises(error, match=message):
            compile_program(nodes, requests, "error", lambda nodes, names, line=line: [[line]])


def test_layouts_say_which_part_of_a_parameter_they_hold():
    whole, other = ff.Layout({"w": (2, 3)}), ff.Layout({"w": (2, 3)}, {"w": ff.Shard("w", (4, 3), (2, 0))})
    first = ff.Layout({"w": (2, 3)}, {"w": ff.Shard("w", (4, 3), (0, 0))})
    assert len({whole, other, first}) == 3
    assert first == ff.Layout({"w": (2, 3)}, {"w": ff.Shard("w", (4, 3), (0, 0))})
    assert first.difference(other, "mine", "theirs") == (
        "w is [2, 3] of [4, 3] from [0, 0] in mine and [2, 3] of [4, 3] from [2, 0] in theirs"
    )
    with pytest.raises(ff.LayoutError, match="a shard of 'v', which is not in the layout"):
        ff.Layout({"w": (2, 3)}, {"v": ff.Shard("v", (4, 3), (0, 0))})
    values = torch.rand(6)
    with pytest.raises(ff.LayoutError, match=r"w is \[2, 3\] of \[4, 3\] from \[0, 0\]"):
        ff.dampen_({"w": torch.ones(2, 3)}, ff.Fisher(values, first), ff.Fisher(values, other))


def test_a_layout_pickled_in_another_process_is_equal():
    layout = ff.Layout({"a.weight": (2, 3), "a.bias": (2,)}, {"a.bias": ff.Shard("a.bias", (4,), (2,))})
    code = (
        "import sys, pickle, fiun_fast as ff\n"
        "made = ff.Layout({'a.weight': (2, 3), 'a.bias': (2,)}, {'a.bias': ff.Shard('a.bias', (4,), (2,))})\n"
        "sys.stdout.buffer.write(pickle.dumps(made))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    again = pickle.loads(run.stdout)
    assert again == layout
    assert hash(again) == hash(layout)
    assert {again: 1}[layout] == 1


def test_values_may_be_written_between_runs():
    problem = build(Case("values", DIAMOND, ("a",), shapes=SIZES))
    plan = problem.plan(None)
    (part,) = plan.parts
    assert np.array_equal(part.dampening.alpha, [1.5] * 4)
    low, high = (torch.zeros(4, 3, dtype=torch.int64) for _ in range(2))
    plan.set_values_(alpha=50.0)
    part.launch.run(high, True)
    plan.set_values_(alpha=0.1)
    part.launch.run(low, True)
    part.launch.run(low, True)  # kernels add
    plan.set_values_(alpha={"b": 50.0})
    alone = torch.zeros(4, 3, dtype=torch.int64)
    part.launch.run(alone, True)
    assert (low[:, 0] > 2 * high[:, 0]).all()
    assert torch.equal(alone[1], high[1])
    assert torch.equal(2 * alone[0], low[0])
