"""Tensors without plain memory of their own, one of each kind, and what an error says of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fiun_fast as ff

SHAPE = (3, 4)


def fisher(value: float = 1.0) -> ff.Fisher:
    return ff.Fisher.from_dict({"w": torch.full(SHAPE, value)})


def dtensor() -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.ones(SHAPE), init_device_mesh("cpu", (1,)), [Shard(0)])


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(SHAPE)


def freed() -> torch.Tensor:
    tensor = torch.ones(SHAPE)
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened() -> torch.Tensor:
    tensor = torch.ones(SHAPE)
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


def lazy() -> torch.Tensor:
    return nn.parameter.UninitializedParameter()


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(SHAPE), 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(SHAPE[1])] * SHAPE[0], layout=layout)


def sparse(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ones(SHAPE).to_sparse(layout=layout)


KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "DTensor": (dtensor, "a DTensor"),
    "fake": (fake, "a FakeTensor, a tensor subclass without plain memory"),
    "wrapper": (lambda: TwoTensor(torch.ones(SHAPE), torch.ones(SHAPE)), "a TwoTensor, a tensor subclass"),
    "meta": (lambda: torch.ones(SHAPE, device="meta"), "meta"),
    "freed": (freed, "its storage holds 0 bytes"),
    "shortened": (shortened, "its storage holds 47 bytes"),
    "lazy": (lazy, "no shape yet"),
    "quantised": (quantised, "quantised|qint8"),
    "nested": (lambda: nested(torch.strided), "nested|shape"),
    "jagged": (lambda: nested(torch.jagged), "tensor subclass|shape"),
    "coo": (lambda: sparse(torch.sparse_coo), "sparse"),
    "csr": (lambda: sparse(torch.sparse_csr), "sparse"),
    "mkldnn": (lambda: torch.ones(SHAPE).to_mkldnn(), "_mkldnn"),
    "zeros": (lambda: torch._efficientzerotensor(SHAPE), "zero tensor"),
    "negated": (lambda: torch.complex(torch.ones(SHAPE), torch.ones(SHAPE)).conj().imag, "negated"),
}
