"""What models and optimisers come wrapped in, and how to look through it; or why that cannot be done.

Wrappers are told by the names of their classes and base classes, so that none of their packages is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .errors import ArgumentError, EstimationError, LayoutError


class Wrapper(NamedTuple):
    """A kind of wrapper.

    Attributes:
        key: the submodule that is wrapped; no part of a parameter's name as this package has it.
        bypassed: the wrapped module may be called in its stead. Where it may not, its forward does more, or less.

    """

    key: str
    bypassed: bool


_DDP = "torch.nn.parallel.distributed.DistributedDataParallel"
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_OPACUS = "opacus.grad_sample.gsm_base.AbstractGradSampleModule"
_PEFT_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_ENGINES = ("deepspeed.runtime.engine.DeepSpeedEngine", "deepspeed.inference.engine.InferenceEngine")
KNOWN = {
    _DDP: Wrapper("module", True),
    "torch.nn.parallel.data_parallel.DataParallel": Wrapper("module", True),
    "torch._dynamo.eval_frame.OptimizedModule": Wrapper("_orig_mod", True),
    "torch.optim.swa_utils.AveragedModel": Wrapper("module", True),
    "timm.utils.model_ema.ModelEmaV2": Wrapper("module", True),
    "timm.utils.model_ema.ModelEmaV3": Wrapper("module", True),
    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel": Wrapper("module", True),
    _OPACUS: Wrapper("_module", True),
    "lightning.fabric.wrappers._FabricModule": Wrapper("_forward_module", True),
    "lightning_fabric.wrappers._FabricModule": Wrapper("_forward_module", True),
    **dict.fromkeys(_ENGINES, Wrapper("module", False)),
    _FSDP: Wrapper("_fsdp_wrapped_module", False),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": Wrapper(
        "_checkpoint_wrapped_module", False
    ),
    "peft.peft_model.PeftModel": Wrapper("base_model", False),
    "peft.mixed_model.PeftMixedModel": Wrapper("base_model", False),
    "peft.tuners.tuners_utils.BaseTuner": Wrapper("model", False),
    _PEFT_LAYER: Wrapper("base_layer", False),
}
_BY_PEFT = ("base_model", "model")  # these two say something only where they stand together
_KEYS = frozenset(wrapper.key for wrapper in KNOWN.values()) - set(_BY_PEFT)
# what PEFT's layers keep by the names of adapters, a step that is not in the state dicts it saves: `lora_A.default`
_KEPT = (
    "adamss c3a beft boft deft delora fourierft frod glora gralora hada hira hra ia3 lily ln_tuning lokr lora miss oft "
    "osf peanut poly psoft pvera randlora road shadow shira supertuning tinylora trainable_tokens unilora vblora vera "
    "waveft"
)
_ADAPTER = re.compile(
    rf"(?<![^.])((?:{'|'.join(_KEPT.split())})_\w+)\.(?!(?:weight|bias)$)([^.]+)|modules_to_save\.([^.]+)\."
)
_INNER = ("optimizer", "original_optimizer", "base_optimizer", "base", "optim")  # where wrappers keep an optimiser


_CONSOLIDATED = "one into which the weights of a checkpoint were loaded (zero_to_fp32.py makes them)"

_classes: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _known_as(kind: type) -> tuple[str, ...]:
    """The names of a class and its base classes that are in `KNOWN`."""
    if kind not in _classes:
        names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
        _classes[kind] = tuple(name for name in names if name in KNOWN)
    return _classes[kind]


def is_wrapper(kind: type) -> bool:
    """Whether modules of this class are wrappers."""
    return bool(_known_as(kind))


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """What kind of wrapper a module is; None where it is none."""
    found = next((KNOWN[name] for name in _known_as(type(module))), None)
    return found if found is not None and isinstance(module._modules.get(found.key), nn.Module) else None


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has added an adapter, or prompts, to the model."""
    return any(name.startswith("peft.") for module in model.modules() for name in _known_as(type(module)))


def is_adapted_layer(module: nn.Module) -> bool:
    """Whether it is a layer to which PEFT has added an adapter."""
    return _PEFT_LAYER in _known_as(type(module))


class Unwrapped(NamedTuple):
    """A model without its wrappers, and the names of their classes, outermost first."""

    module: nn.Module
    wrappers: tuple[str, ...]


def unwrap(model: nn.Module) -> Unwrapped:
    """Take off what a model may be called without: DistributedDataParallel, DataParallel, torch.compile, Opacus, ….

    What then runs is this process's own part: no gradient is reduced over ranks, nothing is replicated or compiled.
    """
    names: list[str] = []
    while (wrapper := wrapper_of(model)) is not None and wrapper.bypassed:
        names.append(type(model).__name__)
        model = model._modules[wrapper.key]  # type: ignore[assignment]
    return Unwrapped(model, tuple(names))


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Wrappers at and inside the model do nothing beside its forward and backward: no reduction, no per-sample grads.

    Args:
        model: as the user has it: some wrappers leave hooks in the modules below.

    Raises:
        EstimationError: on exit, if DistributedDataParallel has reduced gradients all the same, because it awaited the
            backward of an earlier forward.

    """
    with ExitStack() as stack:
        for module in model.modules():
            names = _known_as(type(module))
            if _DDP in names:
                stack.enter_context(module.no_sync())  # type: ignore[operator]
                stack.enter_context(_unreduced(module))
            elif _OPACUS in names and getattr(module, "hooks_enabled", False):
                module.disable_hooks()  # type: ignore[operator]
                stack.callback(module.enable_hooks)  # type: ignore[arg-type]
        yield


@contextmanager
def _unreduced(module: Any) -> Iterator[None]:
    """Notice whether the reducer of a DistributedDataParallel took gradients: it times each that it gets."""
    before = module.reducer.get_backward_stats()
    error: Exception | None = None
    try:
        yield
    except RuntimeError as found:  # its own: a gradient came twice
        error = found
    if module.reducer.get_backward_stats() != before:
        raise EstimationError(
            "DistributedDataParallel has taken gradients for those of an earlier forward: after a forward call its "
            "backward, or run it under torch.no_grad(), before a Fisher is estimated"
        ) from error
    if error is not None:
        raise error


def check_gathered(what: str, model: nn.Module, *, for_good: bool = False) -> None:
    """Raise a LayoutError that begins with `what` where parameters are not where a forward takes them from.

    FullyShardedDataParallel (FSDP1) has cut them up, DeepSpeed keeps others, or a PEFT adapter is merged.

    Args:
        what: the model, for the message.
        model: itself or any of its submodules may be such.
        for_good: also while they are gathered for a moment, when no forward may run and no memory may move.

    """
    for path, module in model.named_modules():
        known = _known_as(type(module))
        check_no_engine(what, module)
        for key, p in module._parameters.items():
            if hasattr(p, "ds_id") and not p.numel():
                raise LayoutError(
                    f"{what}: parameter {f'{path}.{key}'.lstrip('.')!r} is cut up over ranks by DeepSpeed (ZeRO-3): "
                    f"pass a model that is whole, {_CONSOLIDATED}"
                )
        if _PEFT_LAYER in known:
            check_not_merged(what, path, module)
        if _FSDP not in known:
            continue
        if not for_good and getattr(getattr(module, "training_state", None), "name", "") == "SUMMON_FULL_PARAMS":
            continue
        where = f"submodule {path!r} of {what}" if path else what
        inside = "" if for_good else ", or work inside FullyShardedDataParallel.summon_full_params(model)"
        raise LayoutError(
            f"{where} is a FullyShardedDataParallel (FSDP1), which keeps parameters flattened and cut up over ranks: "
            f"pass the model before it is wrapped{inside}"
        )


def check_no_engine(what: str, module: nn.Module) -> None:
    """Raise a LayoutError that begins with `what` where the module is a DeepSpeed engine."""
    if any(name in _ENGINES for name in _known_as(type(module))):
        raise LayoutError(
            f"{what} is a {type(module).__name__} of DeepSpeed, whose optimiser keeps weights of its own, cut up over "
            "ranks, and whose hooks reduce gradients: pass the model before deepspeed.initialize, or "
            f"{_CONSOLIDATED}"
        )


def check_not_merged(what: str, path: str, module: nn.Module) -> None:
    """Raise a LayoutError that begins with `what` where that submodule's PEFT adapter is merged into its layer."""
    if is_adapted_layer(module) and module.merged:
        raise LayoutError(
            f"{what}: the adapter of {path!r} is merged into the layer, so that changing either would leave the other "
            "behind; call model.unmerge_adapter() first, or model.merge_and_unload() and pass what it returns"
        )


def said_of_quantised(model: nn.Module) -> str:
    """What to add to an error that a parameter is not there: torch.ao packs those of quantised layers."""
    for module in model.modules():
        if ".nn.quantized." in type(module).__module__ + "." and callable(getattr(module, "weight", None)):
            kind = type(module).__name__
            return f"; its {kind} is quantised and keeps packed integers: pass the model before it was quantised"
    return ""


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it, as far as the name alone tells.

    A module of one's own may have such a name too: to be used where a name is not known as it stands.
    """
    parts = [part for part in name.split(".") if part not in _KEYS]
    if tuple(parts[:2]) == _BY_PEFT:
        del parts[:2]
    return ".".join(parts) or name


def loose_name(name: str) -> tuple[str, tuple[str, ...]]:
    """A name with still less in it, as files have them, and the names of the adapters that were in it.

    Without the `model.` that Lightning's modules put before all names, and as PEFT saves an adapter:
    `fc.lora_A.default.weight` is `fc.lora_A.weight`, `head.modules_to_save.default.weight` is `head.weight`.
    """
    found = tuple(match[2] or match[3] for match in _ADAPTER.finditer(name))
    plain = _ADAPTER.sub(lambda match: match[1] or "", name) if found else name
    plain = plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")  # of DoRA
    return plain_name(plain).removeprefix("model."), found


def optimizer_in(optimizer: Any) -> torch.optim.Optimizer:
    """The torch.optim.Optimizer itself, or the one that a wrapper of it steps (Accelerate, ScheduleFreeWrapper, …).

    Raises:
        ArgumentError: it is none and has none; or is Opacus' DPOptimizer with noise.

    """
    given, seen = optimizer, set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        if getattr(optimizer, "noise_multiplier", 0):
            raise ArgumentError(
                f"optimizer is a {type(optimizer).__name__}, which adds noise to the gradients, and the noise would be "
                "squared with them; estimate a Fisher over data, ff.estimate_fisher(model, loader)"
            )
        # wrappers that inherit from Optimizer without its constructor have none of its attributes
        if isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
            return optimizer
        inside = (getattr(optimizer, key, None) for key in _INNER)
        optimizer = next((one for one in inside if hasattr(one, "step") and hasattr(one, "param_groups")), optimizer)
    raise ArgumentError(
        f"optimizer is a {type(given).__name__}, expected a torch.optim.Optimizer, or a wrapper that keeps one as "
        f"{', '.join('.' + key for key in _INNER)}"
    )
