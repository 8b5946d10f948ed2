"""Steps of the machine that change its objects in plain torch, as users do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from machine import Machine
from torch import Tensor, nn
from world import (
    DTYPES,
    NODE,
    PARAMETER,
    SEED,
    SHAPES,
    Net,
    bits,
    fisher_fits,
    fits,
    is_whole,
    mapping_of,
    needed,
    parameter_of,
    random_fisher,
    step,
)


class Changes(Machine):
    """Casts, replaced and freed memory, other modules, training, copies."""

    def whole(self) -> bool:
        """Whether torch may read all tensors: it crashes itself where storages were freed."""
        known = [
            p
            for model in self.models.values()
            for p in (model.parameters() if isinstance(model, nn.Module) else model.values())
        ]
        return all(map(is_whole, [*known, *self.tensors()]))

    def put(self, node: str, name: str, tensor: Tensor) -> None:
        held, key = mapping_of(self.models[node], name)
        if held is not None:
            if isinstance(held.get(key), Tensor):
                self.others.append(held[key].detach())
            held[key] = (
                tensor
                if isinstance(self.models[node], dict)
                else nn.Parameter(tensor.detach(), tensor.is_floating_point())
            )

    @step(node=NODE, kind=st.integers(0, 3), again=st.integers(0, 3))
    def cast(self, node: str, kind: int, again: int) -> None:
        """To one dtype and on to another: memory of the first is free again, and may be handed out."""
        model = self.models[node]
        known = model.parameters() if isinstance(model, Net) else model.values()
        if not all(map(is_whole, known)):
            return
        for dtype in (DTYPES[kind], DTYPES[again]):
            if isinstance(model, Net):
                model.to(dtype)
            else:
                model.update({name: tensor.to(dtype) for name, tensor in model.items()})

    @step(
        node=NODE,
        name=PARAMETER,
        how=st.sampled_from(
            ["clone", "half", "turn", "shrink", "same memory", "offset", "reshape", "meta", "integers", "repair"]
        ),
    )
    def replace_data(self, node: str, name: str, how: str) -> None:
        parameter = parameter_of(self.models[node], name)
        if not isinstance(parameter, Tensor):
            return
        if how == "repair" or not is_whole(parameter):
            self.put(node, name, torch.ones(SHAPES[name]))
            return
        data = parameter.detach()
        base = torch.zeros(data.numel() + 9, dtype=data.dtype)
        new: dict[str, Callable[[], Tensor]] = {
            "clone": data.clone,
            "half": data.half,
            "turn": lambda: data.t() if data.dim() == 2 else data,
            "shrink": lambda: data.reshape(-1)[:2],
            "same memory": lambda: data.view(data.shape),
            "offset": lambda: base[3 : 3 + data.numel()].view(data.shape).copy_(data),
            "reshape": lambda: data.reshape(-1),
            "meta": lambda: data.to("meta"),
            "integers": lambda: bits(data).view(data.shape) if data.is_contiguous() else data,
        }
        made = new[how]()
        if isinstance(self.models[node], dict):
            self.put(node, name, made)
        elif made.device == parameter.device:
            self.others.append(data)
            parameter.requires_grad_(parameter.requires_grad and made.is_floating_point())
            parameter.data = made
        elif how == "meta":
            self.put(node, name, made)

    @step(node=NODE, name=PARAMETER, back=st.booleans())
    def free(self, node: str, name: str, back: bool) -> None:
        parameter = parameter_of(self.models[node], name)
        if not isinstance(parameter, Tensor) or not parameter.is_cpu:
            return
        storage = parameter.untyped_storage()
        if not storage.resizable():
            return
        if not back:
            storage.resize_(0)
        elif storage.nbytes() < needed(parameter):
            storage.resize_(needed(parameter))
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    @step(node=NODE, assign=st.booleans(), seed=SEED)
    def load_state(self, node: str, assign: bool, seed: int) -> None:
        model = self.models[node]
        if not isinstance(model, Net) or not all(map(is_whole, model.parameters())):
            return
        generator = torch.Generator().manual_seed(seed)
        state = {k: torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in model.state_dict().items()}
        if any(v.is_floating_point() != p.is_floating_point() for v, p in zip(state.values(), model.parameters())):
            return
        self.others += [p.detach() for p in model.parameters()]
        model.load_state_dict(state, assign=assign)

    @step(node=NODE, what=st.sampled_from(["first", "rest", "rest.0", "rest.1"]), gone=st.booleans(), seed=SEED)
    def exchange_module(self, node: str, what: str, gone: bool, seed: int) -> None:
        model = self.models[node]
        if not isinstance(model, Net):
            return
        above, _, key = what.rpartition(".")
        parent: Any = model._modules.get(above) if above else model
        if parent is None:
            return
        if key in parent._modules:
            self.others.append(parent._modules[key])
        if gone:
            parent._modules.pop(key, None)
            return
        generator = torch.Generator().manual_seed(seed)
        fresh = Net({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
        parent._modules[key] = fresh.get_submodule(what)

    @step(node=NODE, name=PARAMETER, seed=SEED, gone=st.booleans())
    def exchange_parameter(self, node: str, name: str, seed: int, gone: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.put(node, name, torch.randn(SHAPES[name], generator=generator))
        held, key = mapping_of(self.models[node], name)
        if gone and held is not None:
            self.others.append(held.pop(key).detach())

    @step(node=NODE, other=NODE, name=PARAMETER, another=PARAMETER)
    def share(self, node: str, other: str, name: str, another: str) -> None:
        tensor = parameter_of(self.models[other], another)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == SHAPES[name] and tensor.is_floating_point():
            self.put(node, name, tensor.detach())

    @step(node=NODE, name=PARAMETER, seed=SEED)
    def train(self, node: str, name: str, seed: int) -> None:
        parameter = parameter_of(self.models[node], name)
        if is_whole(parameter) and parameter.is_floating_point():
            generator = torch.Generator().manual_seed(seed)
            change = torch.randint(-1, 2, tuple(parameter.shape), generator=generator).to(parameter.dtype)
            with torch.no_grad():
                parameter.add_(change)

    @step(node=NODE, how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_model(self, node: str, how: str) -> None:
        """The copy has the same bits, and nothing that happens to the model happens to the copy."""
        if self.whole():
            model = self.models[node]
            made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
            self.others.append(made)

    @step(
        which=st.integers(0, 5),
        seed=SEED,
        how=st.sampled_from(
            [
                "fresh",
                "in place",
                "repair",
                "double",
                "shorter",
                "none",
                "number",
                "free",
                "half",
                "strided",
                "pickle",
                "data",
            ]
        ),
    )
    def change_fisher(self, which: int, seed: int, how: str) -> None:
        fisher = [*self.fishers.values(), *self.forgets][which]
        buffer = vars(fisher).get("buffer")
        kind = buffer.dtype if isinstance(buffer, Tensor) and buffer.dtype == torch.float64 else torch.float32
        good = random_fisher(seed, kind)
        if not fisher_fits(fisher) or how in ("fresh", "repair"):
            others = [f.buffer.dtype for f in (*self.fishers.values(), *self.forgets) if fisher_fits(f)]
            fisher.buffer = random_fisher(seed, others[0] if others and how == "repair" else kind)
            return
        self.others.append(buffer)
        if how == "in place":
            buffer.copy_(good)
        elif how == "free":
            if buffer.untyped_storage().resizable():  # not after .numpy(), by which an audited run hashes it
                buffer.untyped_storage().resize_(0)
        elif how == "pickle":
            fisher.buffer = pickle.loads(pickle.dumps(fisher)).buffer
        elif how == "data":
            buffer.data = good[:5]
        elif how == "double":
            fisher.buffer = buffer.double()
        else:
            bad = {"shorter": good[:-1], "none": None, "number": 5, "half": good.half(), "strided": good.repeat(2)[::2]}
            fisher.buffer = bad[how]

    @step(node=NODE, fishers=st.booleans())
    def repair(self, node: str, fishers: bool) -> None:
        """Whatever is missing or has another shape or memory is made anew; dtypes stay."""
        model = self.models[node]
        fresh = Net({name: torch.ones(shape) for name, shape in SHAPES.items()})
        if isinstance(model, Net):
            for key in ("first", "rest"):
                model._modules.setdefault(key, fresh.get_submodule(key))
            for key in ("0", "1"):
                model.rest._modules.setdefault(key, fresh.rest.get_submodule(key))
        for name, shape in SHAPES.items():
            if not fits(parameter_of(model, name), None, shape):
                self.put(node, name, torch.ones(shape))
        for fisher in [*self.fishers.values(), *self.forgets] if fishers else []:
            if not fisher_fits(fisher) or fisher.buffer.dtype != torch.float32:
                fisher.buffer = random_fisher(7, torch.float32)

    @step(on=st.booleans())
    def flush_denormal(self, on: bool) -> None:
        """Kernels and plain torch give the same bits whatever this is."""
        torch.set_flush_denormal(on)

    @step(number=st.integers(1, 3))
    def use_threads(self, number: int) -> None:
        torch.set_num_threads(number)
