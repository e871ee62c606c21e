"""What the normalisation ops accept: each failure is one sentence that names the op and the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bigmodel import _check
from bigmodel._native import compute_dtype

_float32, _float64 = torch.float32, torch.float64


def plain(input, residual, shape, weight, bias, eps, weight_offset, memory_efficient, out_dtype):
    """A quick yes to nearly every call, which needs no option and no copy, and whose price on small rows is Python's.

    Naming what is wrong, and the rarer right, is check_arguments' part.
    """
    dtype, index = input.dtype, input.get_device()
    return (
        residual is None
        and len(shape) == 1
        and type(shape[0]) is int
        and input.dim() > 0
        and input.shape[-1] == shape[0] > 0
        and input.is_contiguous()
        and (
            weight is None
            or weight.shape == shape
            and weight.is_contiguous()
            and weight.get_device() == index
            and ((kind := weight.dtype) is dtype or kind is _float32)
            and (
                bias is None
                or bias.shape == shape
                and bias.is_contiguous()
                and bias.get_device() == index
                and bias.dtype is kind
            )
        )
        and (bias is None or weight is not None)
        and type(eps) is float
        and 0.0 <= eps < math.inf
        and weight_offset == 0.0
        and memory_efficient is False
        and out_dtype is dtype
    )


def check_options(op: str, eps: Any, weight_offset: Any, memory_efficient: Any, out_dtype: Any) -> None:
    _check.number(op, "eps", eps, minimum=0)
    _check.number(op, "weight_offset", weight_offset)
    _check.flag(op, "memory_efficient", memory_efficient)
    _check.dtype(op, "out_dtype", out_dtype)


def check_module(
    op: str, normalized_shape: Any, eps: Any, weight_offset: Any, memory_efficient: Any, out_dtype: Any, affine: bool
) -> None:
    """Refuses in a constructor what the first call would; None for an eps or out_dtype that the op chooses."""
    if isinstance(normalized_shape, Iterable) and not isinstance(normalized_shape, (str, Tensor)):
        normalized_shape = tuple(normalized_shape)
    _check.shape(op, normalized_shape)
    check_options(
        op, 0.0 if eps is None else eps, weight_offset, memory_efficient, _float32 if out_dtype is None else out_dtype
    )
    check_offset(op, affine, weight_offset)


def check_offset(op: str, affine: bool, weight_offset: float) -> None:
    if not affine and weight_offset:
        raise ValueError(f"{op}: weight_offset is {weight_offset}, but there is no weight to add it to.")


def check_arguments(
    op, input, residual, weight, bias, shape, eps, weight_offset, memory_efficient, out_dtype, x_dtype
) -> None:
    shape = _check.shape(op, shape)
    dims = len(shape)
    if not dims or input.dim() < dims or tuple(input.shape[input.dim() - dims :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape {shape} does not match the end of input's shape {tuple(input.shape)}."
        )
    if residual is not None:
        _check.like(op, "residual", residual, input.shape, "input", input.device)
    _check_affine(op, weight, bias, shape, x_dtype, input.device)
    check_options(op, eps, weight_offset, memory_efficient, out_dtype)
    check_offset(op, weight is not None, weight_offset)


def check_forward(
    op, input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype
) -> None:
    """The arguments of the registered forward op, which anybody may call."""
    _check.tensor(op, "input", input)
    _check_dims(op, "input", input, dims)
    _check.dtype(op, "x_dtype", x_dtype)
    if residual is None and x_dtype is not input.dtype:
        raise TypeError(f"{op}: x_dtype is {x_dtype}, but without a residual it must be input's {input.dtype}.")
    shape = tuple(input.shape[input.dim() - dims :])
    check_arguments(op, input, residual, weight, bias, shape, eps, weight_offset, memory_efficient, out_dtype, x_dtype)


def _check_dims(op: str, argument: str, tensor: Tensor, dims: int) -> None:
    if not 0 < dims <= tensor.dim():
        raise ValueError(f"{op}: dims is {dims}; {argument} of shape {tuple(tensor.shape)} has 1 to {tensor.dim()}.")


def _check_affine(op, weight, bias, shape, x_dtype, device) -> None:
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.like(op, argument, value, shape, "normalized_shape", device)
            if value.dtype is _float64 and x_dtype is not _float64:
                raise TypeError(
                    f"{op}: {argument} is float64, but {x_dtype} is normalised; pass it in {x_dtype} or float32."
                )
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"{op}: bias has dtype {bias.dtype}, but weight has {weight.dtype}; they must be the same.")


# --- backward ---------------------------------------------------------------------------------------------------------


def plain_kept(grad_out, saved, statistics, weight, bias, centred, kind):
    """Whether what a `plain` call saved, its parameters in dtype `kind`, has come back as it was.

    All are plain tensors on a CPU or CUDA device.
    """
    dtype, shape, index = grad_out.dtype, grad_out.shape, grad_out.get_device()
    return (
        saved.dtype is dtype
        and saved.shape == shape
        and saved.get_device() == index
        and statistics.dtype is (_float64 if dtype is _float64 else _float32)
        and statistics.numel() * shape[-1] == grad_out.numel() * (2 if centred else 1)
        and statistics.get_device() == index
        and (weight is None or weight.dtype is kind and weight.shape == shape[-1:] and weight.get_device() == index)
        and (bias is None or bias.dtype is kind and bias.shape == shape[-1:] and bias.get_device() == index)
    )


def check_kept(op, grad_out, saved, statistics, weight, bias, dims, centred, saved_dtype, x_dtype, kind) -> None:
    """ValueError unless what was saved, the parameters in dtype `kind`, has come back as it was."""
    shape, device = grad_out.shape, grad_out.device
    rows, inner = shape[: len(shape) - dims], shape[len(shape) - dims :]
    _check.kept(op, "tensor", saved, shape, saved_dtype, device)
    count = math.prod(rows) * (2 if centred else 1)
    flat = statistics.shape if statistics.numel() == count else (count,)
    _check.kept(op, "statistics", statistics, flat, compute_dtype(x_dtype), device)
    if weight is not None:
        _check.kept(op, "weight", weight, inner, kind, device)
    if bias is not None:
        _check.kept(op, "bias", bias, inner, kind, device)


def check_backward(
    op, centred, grad_out, grad_summed, saved, statistics, weight, bias, dims, weight_offset, from_output, x_dtype,
    cast_dtype, wants_weight, wants_bias,
) -> None:  # fmt: skip
    """The arguments of the registered backward op, which anybody may call."""
    _check.tensor(op, "grad_out", grad_out)
    _check.dtype(op, "x_dtype", x_dtype)
    if cast_dtype is not None:
        _check.dtype(op, "cast_dtype", cast_dtype)
    _check.number(op, "weight_offset", weight_offset)
    shape, device = grad_out.shape, grad_out.device
    _check_dims(op, "grad_out", grad_out, dims)
    rows, inner = shape[: len(shape) - dims], shape[len(shape) - dims :]
    moments = (2 if centred else 1, *rows)
    _check.exactly(op, "saved", saved, shape, "grad_out", grad_out.dtype if from_output else x_dtype, device)
    _check.exactly(op, "statistics", statistics, moments, "one for each row", compute_dtype(x_dtype), device)
    if grad_summed is not None:
        _check.exactly(op, "grad_summed", grad_summed, shape, "grad_out", x_dtype, device)
    _check_affine(op, weight, bias, tuple(inner), x_dtype, device)
    for argument, value, wanted in (("weight", weight, wants_weight), ("bias", bias, wants_bias)):
        if wanted and value is None:
            raise ValueError(f"{op}: {argument} is None, but wants_{argument} is True.")
