"""Argument checks that every op shares: each failure is one sentence naming the op and the argument."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from bigmodel import _native
from bigmodel._native import DTYPE_CODES

SUPPORTED = "float32, bfloat16, float16 or float64"
_LARGEST = sys.float_info.max


def kind(value: Any) -> str:
    """The name of a value's type; numpy's bool is not called like Python's."""
    cls = type(value)
    return f"numpy.{cls.__name__}" if cls.__module__ == "numpy" else cls.__name__


def flag(op: str, argument: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{op}: {argument} must be a bool, got {kind(value)}.")


def tensor(op: str, argument: str, value: Any) -> None:
    """A dense floating-point tensor of a supported dtype on a supported device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {kind(value)}.")
    if value.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: {argument} has dtype {value.dtype}; supported are {SUPPORTED}.")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{op}: {argument} must be a dense torch.strided tensor, got a nested one or {value.layout}.")
    if not value.is_cpu:
        _device(op, argument, value)


def _device(op: str, argument: str, value: Tensor) -> None:
    if not (value.is_cuda or value.is_meta):
        raise ValueError(f"{op}: {argument} is on device '{value.device}'; supported are cpu and cuda.")
    native = _native.load()
    if value.is_cuda and not hasattr(native, "cuda") and not is_fake(value):
        raise ValueError(f"{op}: {argument} is on device '{value.device}', but CUDA was {native.cuda_status}.")


def like(op: str, argument: str, value: Tensor, shape: Sequence[int], what: str, device: torch.device) -> None:
    """A tensor of exactly this shape (described by `what`) on this device."""
    tensor(op, argument, value)
    if value.shape != shape:
        raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, but {what} is {tuple(shape)}.")
    if value.device != device:
        raise ValueError(f"{op}: {argument} is on device '{value.device}', but input is on '{device}'.")


def exactly(
    op: str, argument: str, value: Any, shape: Sequence[int], what: str, dtype: torch.dtype, device: torch.device
) -> None:
    """As `like`, and of this dtype."""
    like(op, argument, value, shape, what, device)
    if value.dtype is not dtype:
        raise TypeError(f"{op}: {argument} has dtype {value.dtype}; it must be {dtype}.")


def kept(op: str, what: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A saved tensor is what was saved: torch.autograd.graph.saved_tensors_hooks may give back anything."""
    if value.dtype is not dtype or value.shape != shape or value.device != device:
        raise ValueError(
            f"{op}: the {what} saved for backward, {dtype} of shape {tuple(shape)} on '{device}', came back from a "
            f"hook on saved tensors as {value.dtype} of shape {tuple(value.shape)} on '{value.device}'."
        )


def no_wider(op: str, argument: str, value: Tensor, scores: Any) -> None:
    """Not float64 beside scores of another dtype, whose arithmetic in float32 would round it."""
    if value.dtype is torch.float64 and scores.dtype is not torch.float64:
        kinds = "float32" if scores.dtype is torch.float32 else f"{scores.dtype} or float32"
        raise TypeError(f"{op}: {argument} is float64, but the scores are {scores.dtype}; pass it in {kinds}.")


def shape(op: str, value: Any) -> tuple[int, ...]:
    """normalized_shape as a tuple: of a sequence, or of one size, numpy's integers and symbolic ones included."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for size in sizes:
        if isinstance(size, (bool, Tensor)) or not hasattr(size, "__index__"):
            raise TypeError(f"{op}: normalized_shape must be an int or a sequence of ints, got {value!r}.")
    return sizes


def dtype(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{op}: {argument} must be a torch.dtype, got {value!r}; supported are {SUPPORTED}.")
    if value not in DTYPE_CODES:
        raise TypeError(f"{op}: {argument} is {value}; supported are {SUPPORTED}.")


def real(op: str, argument: str, value: Any) -> float:
    """A real number, infinities and NaN among them; numpy's and others come back as a float, a huge one as infinity."""
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, 1 if value >= 0 else -1)  # type: ignore[operator]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {argument} must be a number, got {kind(value)}.")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        return math.inf if value > 0 else -math.inf
    return value


def number(op: str, argument: str, value: Any, minimum: float = -math.inf) -> float:
    """A finite real number, at least `minimum`; numpy's and others come back as a float."""
    value = real(op, argument, value)
    if not (minimum <= value < math.inf and value > -math.inf):  # isfinite cannot be traced with a symbolic float
        least = "" if minimum == -math.inf else f" and at least {minimum:g}"
        raise ValueError(f"{op}: {argument} is {value}; it must be finite{least}.")
    return value
