"""Between torch and the native functions: the only file that touches torch.library.

An op has two ways in. The short way calls its body, or one autograd.Function around it, and costs a few microseconds;
`direct` says when it may be taken. Everything else (torch.compile, fake and meta tensors, DTensor, tracing, dispatch
modes) goes through the op that `register` puts into torch's dispatcher; torch.func's transforms see torch's own ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bigmodel import _memory, _native

_C = _native.load()
_LIBRARY = torch.library.Library("bigmodel", "DEF")

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_forward_ad = torch.autograd.forward_ad


def direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call on these tensors may skip torch's dispatcher: all plain, on one real device, nothing watching."""
    if _is_compiling() or _dispatch_modes() or _tracing_state() is not None:
        return False
    if _functorch_level() is not None or _forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if (
                (kind is not Tensor and kind is not Parameter)
                or not (tensor.is_cpu or tensor.is_cuda)
                or tensor.is_neg()
                or _wrapped(tensor)  # left behind by a transform of torch.func, without memory of its own
            ):
                return False
    return True


def applier(function: type[torch.autograd.Function]) -> Callable:
    """The function's `apply` for `direct` tensors: without the 2 us that torch takes to look for transforms."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def transforming() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active: registered autograd formulas know neither."""
    return not _is_compiling() and (_functorch_level() is not None or _forward_ad._current_level >= 0)


def batched(tensor: Tensor | None) -> bool:
    """Whether a gradient comes from torch.autograd.grad(is_grads_batched=True), whose vmap has no level of its own."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def native(tensor: Tensor) -> Any:
    """The table of native functions for the tensor's device, which `_check.tensor` has accepted."""
    return _C.cpu if tensor.is_cpu else _C.cuda


def place(tensor: Tensor) -> tuple[int, int]:
    """The last two arguments of a native call: (threads, 0) on a CPU, (device ordinal, stream) on CUDA."""
    if tensor.is_cpu:
        return torch.get_num_threads(), 0
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def capturing(device: torch.device) -> bool:
    """Whether calls on the device are being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh contiguous output; on a CPU a large one in memory that is kept between calls."""
    if tensor.is_cpu and tensor.numel() * dtype.itemsize >= _memory.LARGE:
        return _memory.empty(tensor.shape, dtype)
    if tensor.is_contiguous():  # half the price of the other call, and nothing to change about the strides
        return torch.empty_like(tensor) if tensor.dtype is dtype else torch.empty_like(tensor, dtype=dtype)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def in_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor; on a CPU, if it is large, its memory comes in huge pages where it has not been touched yet."""
    if fresh.nbytes >= _memory.LARGE and fresh.is_cpu:
        _C.cpu.advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110, a generator for any() takes twice the time
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The result dtype of an op that torch's autocast runs in float32 on CUDA and leaves alone on a CPU."""
    if tensor.is_cuda and tensor.dtype is not torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return tensor.dtype


_sharding_rules: dict[Any, Callable] = {}


def register(
    name: str,
    schema: str,
    body: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    sharding: Callable | None = None,
) -> Any:
    """Defines `bigmodel::name` for CPU and CUDA and returns the op; call it through `dispatch`.

    `backward` and `setup_context` are those of torch.library.register_autograd; `sharding` is a DTensor rule for
    torch.distributed.tensor.experimental.register_sharding.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, body, "CPU")
    _LIBRARY.impl(name, body, "CUDA")
    qualified = f"bigmodel::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.bigmodel, name).default
    if sharding is not None:
        _sharding_rules[op] = sharding
    return op


def present(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A schema has no optional results: an empty tensor stands for one that does not exist."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def dispatch(op: Any, *args: Any) -> Any:
    """Calls a registered op, after giving DTensor its rules if DTensor is in use."""
    if _sharding_rules and not _is_compiling() and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _sharding_rules:
            ruled, rule = _sharding_rules.popitem()
            register_sharding(ruled)(rule)
    return op(*args)
