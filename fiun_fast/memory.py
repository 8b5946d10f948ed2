"""The memory of tensors: whether a kernel may have it, where it lies, and that nothing overlaps.

Kernels take addresses. A DTensor's address is 0, a fake tensor's leads nowhere, a freed storage's to whatever lies
there now: each of these must be an error before its address is taken. `check_addressable` says what such a tensor is
and what to pass instead.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arguments import THETA_DTYPES
from .dtensors import is_dtensor
from .errors import ArgumentError, DeviceError, DTypeError, FiunError, LayoutError

Container = Mapping[str, Any]
Place = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype, torch.device]
_FUNCTIONS = (
    "data_ptr",
    "storage_size",
    "dtype",
    "device_type",
    "device_index",
    "dim",
    "sizes",
    "strides",
    "storage_offset",
)
_COUNT_UP = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"  # torch::autograd::impl::bump_version
_LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")

_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys
_DTENSOR = "torch.distributed.tensor"
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


# ---- may a kernel have it? ------------------------------------------------------------------------------------------


class Flaw(NamedTuple):
    """Why a tensor's address may not be taken."""

    error: type[FiunError]
    text: str

    def raised(self, where: str) -> FiunError:
        """The error, to be raised by whoever knows where the tensor stands."""
        return self.error(f"{where}: {self.text}")


def check_addressable(where: str, tensor: object) -> None:
    """Raise a FiunError that begins with `where`, unless the tensor is plain, dense and has all the memory it needs."""
    if (flaw := flaw_of(tensor)) is not None:
        raise flaw.raised(where)


def flaw_of(tensor: Any) -> Flaw | None:
    """What is wrong with taking this tensor's address, or None. One or two microseconds where nothing is."""
    if type(tensor) not in _TYPES or _dispatch_keys(tensor).raw_repr() not in _PLAIN:
        if not isinstance(tensor, Tensor):
            return Flaw(ArgumentError, f"a {type(tensor).__name__}, expected a tensor")
        if (flaw := _kind_of(tensor)) is not None:
            return flaw
        if type(tensor) in _TYPES and tensor.is_cuda:
            _PLAIN.add(_dispatch_keys(tensor).raw_repr())  # all that `_kind_of` finds shows in the keys
    if not tensor.is_cpu and not tensor.is_cuda:
        try:  # mps, xpu and others have memory, which the reference backend can use; lazy devices have none
            tensor.data_ptr()
        except RuntimeError:
            return Flaw(DeviceError, f"on {tensor.device}, which has no memory that can be addressed")
    return flaw_of_storage(tensor)


def flaw_of_kind(tensor: Any) -> Flaw | None:
    """What is wrong with laying out a tensor by its shape, or None: `flaw_of` without a look at its memory.

    A tensor on meta has a shape like any other; that it has no numbers is said where these are needed. Of a DTensor the
    local part is laid out.
    """
    if type(tensor) in _TYPES and (tensor.is_meta or _dispatch_keys(tensor).raw_repr() in _PLAIN):
        return None
    if is_dtensor(tensor):
        return None
    return _kind_of(tensor) if isinstance(tensor, Tensor) else flaw_of(tensor)


def check_loaded(model: torch.nn.Module) -> None:
    """Raise a FiunError for the first parameter or buffer that is on meta, freed or lazy: a forward needs all."""
    for what, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            flaw = None
            if is_lazy(tensor) or tensor.is_meta:
                flaw = flaw_of(tensor)
            elif type(tensor) in _TYPES and _dispatch_keys(tensor).raw_repr() in _PLAIN:
                flaw = flaw_of_storage(tensor)
            if flaw is not None:
                raise flaw.raised(f"{what} {name!r}")


def all_plain(tensors: list[Any]) -> bool:
    """Whether all are tensors without a flaw, contiguous and of one dtype; False where that is not certain.

    A tenth of a microsecond each, if torch's functions can be reached, where `flaw_of` takes one or two.
    """
    if not tensors:
        return True
    if not torch_functions() or not set(map(type, tensors)) <= set(_TYPES):
        return False
    if not {keys.raw_repr() for keys in map(_dispatch_keys, tensors)} <= _PLAIN:
        return False
    return places().fit(tensors, tensors[0].itemsize)


def flaw_of_storage(tensor: Tensor) -> Flaw | None:
    """What is wrong with the memory of a tensor that is otherwise plain: its storage is too small for it; or None."""
    held = tensor.untyped_storage().nbytes()
    if held == tensor.nbytes and tensor.is_contiguous() and tensor.storage_offset() == 0:  # as most are
        return None
    if held < (needed := needed_bytes(tensor)):
        return Flaw(
            LayoutError,
            f"its storage holds {held:,} bytes, and shape {list(tensor.shape)} needs {needed:,}: it was freed or "
            "shortened (storage.resize_, as FSDP does between uses); give it back its memory first",
        )
    return None


def _no_mode() -> bool:
    """Whether no mode and no transform is active at all; False where this torch does not tell."""
    try:
        return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None
    except AttributeError:
        return False


def check_no_mode() -> None:
    """Raise a LayoutError where tensors that are made now are not real: under FakeTensorMode, inside torch.func."""
    if _no_mode():
        return
    if flaw_of(torch.empty(0, device="cpu")) is not None:
        raise LayoutError(
            "tensors made here have no memory: FakeTensorMode, make_fx or a torch.func transform is active; "
            "call this package outside it"
        )


def check_one_device(tensors: Mapping[str, Tensor], label: Callable[[str], str]) -> None:
    """Raise a DeviceError that names the first tensor on another device than the first one."""
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            raise DeviceError(f"{label(name)} is on {tensor.device}, expected {like.device} as {first!r}")


def is_lazy(tensor: Tensor) -> bool:
    """Whether it is a parameter or buffer of a lazy module that has no shape yet."""
    return isinstance(tensor, (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer))


def has_no_shape(tensor: Tensor) -> bool:
    """Whether even asking for its shape is an error: lazy, or nested."""
    return tensor.is_nested or is_lazy(tensor)


def needed_bytes(tensor: Tensor) -> int:
    """Bytes that the tensor's storage must have, from the storage's start to the tensor's last element."""
    if tensor.is_contiguous():
        numel = tensor.numel()
        return (int(tensor.storage_offset()) + numel) * tensor.itemsize if numel else 0
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def check_writable(labels: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """Raise a LayoutError where a tensor lies in memory that the system maps read-only (np.memmap(mode="r"), a file).

    Writing there would end the process. Only storages that torch did not allocate itself are looked up, on Linux.
    """
    foreign = [
        (label, t)
        for label, t in zip(labels, tensors, strict=True)
        if not t.untyped_storage().resizable() and t.device.type == "cpu" and t.numel()
    ]
    if not foreign:
        return
    read_only = _read_only_ranges()
    for label, t in foreign:
        first = t.data_ptr()
        last = first + needed_bytes(t) - t.storage_offset() * t.itemsize
        if any(start < last and first < end for start, end in read_only):
            raise LayoutError(f"{label}: its memory is mapped read-only (a file, or np.memmap); pass a copy, t.clone()")


def _read_only_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that may be read but not written to; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, permissions = line.split(None, 2)[:2]
        if "r" in permissions and "w" not in permissions:
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _plain() -> set[int]:
    """Dispatch keys of tensors that are certainly plain: in main memory, with and without autograd.

    A set of keys is an integer, and only those in here skip `_kind_of`.
    """
    with torch.device("cpu"):
        tensors = [torch.empty(0, device="cpu")]
        with torch.inference_mode():
            tensors.append(torch.empty(0, device="cpu"))
    return {_dispatch_keys(t).raw_repr() for t in tensors}


_PLAIN = _plain()


def _kind_of(tensor: Tensor) -> Flaw | None:
    """What kind of tensor without memory of its own this is, or None."""
    kind = type(tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return Flaw(LayoutError, "it is inside torch.func (vmap, grad or jvp); call this package outside the transform")
    if _dispatch_keys(tensor).has(torch._C.DispatchKey.Functionalize):
        return Flaw(LayoutError, "it is inside torch.func.functionalize; call this package outside the transform")
    if kind.__module__.startswith(_DTENSOR):
        return Flaw(
            LayoutError,
            "it is a DTensor, whose numbers lie on several ranks; pass tensor.full_tensor(), or this rank's part, "
            "tensor.to_local()",
        )
    if is_lazy(tensor):
        return Flaw(LayoutError, "it has no shape yet: run the lazy module once on a batch")
    if _dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return Flaw(
            LayoutError,
            f"it is a {kind.__name__}, a tensor subclass without plain memory of its own; pass the tensor it wraps",
        )
    if tensor.is_meta:
        return Flaw(
            DeviceError,
            "it is on meta and has no numbers: its weights are offloaded or not loaded; load them first (Accelerate: "
            "accelerate.hooks.remove_hook_from_submodules(model))",
        )
    if tensor.is_nested or tensor.layout == torch.jagged:
        return Flaw(LayoutError, "it is a nested tensor; expected a dense one (tensor.to_padded_tensor(0))")
    if tensor.layout in _SPARSE:
        return Flaw(LayoutError, f"it is sparse ({tensor.layout}); expected a dense tensor (tensor.to_dense())")
    if tensor.layout != torch.strided:
        return Flaw(LayoutError, f"it is laid out as {tensor.layout}; expected a dense tensor (tensor.to_dense())")
    if tensor.is_quantized:
        return Flaw(DTypeError, f"it is quantised ({tensor.dtype}); expected floating point (tensor.dequantize())")
    if tensor._is_zerotensor():
        return Flaw(LayoutError, "it is a zero tensor without memory; pass a copy, tensor.clone()")
    if tensor.is_neg() or tensor.is_conj():
        return Flaw(LayoutError, "it is negated or conjugated when read, not in memory; pass tensor.resolve_neg()")
    return None


# ---- where does it lie? ---------------------------------------------------------------------------------------------


def place_of(tensor: Tensor) -> Place:
    """How a tensor lies in memory: address, bytes of its storage, shape, stride, dtype, device.

    An address alone says little: allocators hand it out again, `.half().bfloat16()` may come back to it with another
    dtype, and `.data = .data.t()` keeps it.
    """
    held = tensor.untyped_storage().nbytes()
    return tensor.data_ptr(), held, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def places() -> Any:
    """An empty `_cpu.Places`; torch's functions have been tried."""
    extension = cpu_extension()
    assert extension is not None
    return extension.Places(torch_functions())


@functools.cache
def cpu_extension() -> ModuleType | None:
    """The extension of the cpu backend, which has the checks too; None where it was not built."""
    from .kernels.cpu import load

    module = load()
    return None if isinstance(module, str) else module


@functools.cache
def torch_functions() -> tuple[int, ...]:
    """Addresses of torch's C functions that csrc/cpu/homes.h calls; none where they cannot be relied on.

    They are tried on tensors of every kind that a home may hold: what they say must be what Python says.
    """
    extension = cpu_extension()
    if extension is None:
        return ()
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY))
        found = [getattr(library, f"aoti_torch_get_{name}") for name in _FUNCTIONS]
    except (OSError, AttributeError):
        return ()
    addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found)
    probe = extension.Places(addresses)
    base = torch.arange(24.0, device="cpu")
    trials = (base, base.view(2, 3, 4), base[5:9], base.view(4, 6).t(), base[3], base[:0].view(0, 3))
    kinds = set()
    for dtype in (*THETA_DTYPES, torch.int8):
        for trial in trials:
            tensor = trial.to(dtype)
            address, held, shape, stride, _, _ = place_of(tensor)
            said = probe.of(tensor)
            if said[:2] != [address, held] or said[5:] != [len(shape), *shape, *stride]:
                return ()
            empty = tensor.numel() == 0
            if probe.fit([tensor], tensor.itemsize) != tensor.is_contiguous() or probe.fit([tensor], held + 1) != empty:
                return ()
            kinds.add((dtype, tuple(said[2:5])))
    told_apart = len(kinds) == len({code for _, code in kinds}) == len(THETA_DTYPES) + 1
    return addresses if told_apart else ()


def dict_numbers() -> Any:
    """An empty `_cpu.Held`; that this Python numbers its dicts has been tried."""
    extension = cpu_extension()
    assert extension is not None
    return extension.Held()


@functools.cache
def dicts_are_numbered() -> bool:
    """Whether a dict, and the attributes of an object, get a new number at each change that matters (PEP 509)."""
    extension = cpu_extension()
    if extension is None or extension.Held.number({}) == 0:
        return False

    class Holder:
        """Its attributes lie in a dict that has been asked for, as a module's do."""

        def __init__(self) -> None:
            self.held: object = None

    def store(holder: Holder, value: object) -> None:
        holder.held = value

    holder = Holder()
    changes: list[Callable[[], object]] = [
        lambda: vars(holder).__setitem__("held", object()),
        lambda: vars(holder).update(held=object()),
        lambda: setattr(holder, "held", object()),
        lambda: object.__setattr__(holder, "held", object()),
        *[lambda: store(holder, object())] * 64,  # the interpreter adapts to what is done often
        lambda: vars(holder).pop("held"),
        lambda: vars(holder).setdefault("held", object()),
        lambda: delattr(holder, "held"),
        lambda: vars(holder).__ior__({"held": object()}),
        lambda: vars(holder).clear(),
    ]
    for change in changes:
        dictionary = vars(holder)
        before = extension.Held.number(dictionary)
        if before != extension.Held.number(dictionary):
            return False
        change()
        if extension.Held.number(dictionary) == before:
            return False
    return True


@functools.cache
def version_function() -> int:
    """Address of torch's C++ function that counts up a tensor's version; 0 where it cannot be relied on."""
    if not torch_functions():
        return 0
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY))
        function = ctypes.cast(getattr(library, _COUNT_UP), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
    with torch.inference_mode(False):
        base = torch.zeros(3, device="cpu")
        leaf = torch.zeros(3, device="cpu", requires_grad=True)
        trials = [base, leaf, torch.nn.Parameter(torch.zeros(2, device="cpu")), leaf * 2, torch.zeros(2, device="cpu")]
        trials[-1].data = base[1:]
        watched = [*trials, base[1:]]  # a view has its base's counter
        before = [tensor._version for tensor in watched]
        counters = places()
        counters.take(trials)
        counters.count_up(trials, function, 1)
        counted = [tensor._version - version for tensor, version in zip(watched, before, strict=True)]
    return function if counted == [1] * len(counted) else 0


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a dense or strided tensor can touch; empty for no elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def check_disjoint(starts: np.ndarray, ends: np.ndarray, label: Callable[[int], str]) -> None:
    """Raise a LayoutError that names the first pair of [start, end) byte ranges that overlap; all are 1-D [n].

    Args:
        starts, ends: [n] int64.
        label: index of a range -> what it is, for the message.

    """
    keep = np.flatnonzero(ends > starts)
    order = keep[np.argsort(starts[keep], kind="stable")]
    clash = np.flatnonzero(starts[order[1:]] < ends[order[:-1]])
    if clash.size:
        i = clash[0]
        raise LayoutError(
            f"{label(int(order[i]))} and {label(int(order[i + 1]))} share memory: each would be dampened twice; "
            "clone one of them, or leave it out"
        )
