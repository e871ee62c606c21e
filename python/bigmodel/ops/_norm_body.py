"""The native calls of the normalisation ops: allocate what is returned, then one call. Nothing is checked here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel._native import DTYPE_CODES, compute_dtype


def as_rows(tensor: Tensor, cols: int) -> tuple[Tensor, int]:
    """The tensor, or a copy if its rows do not lie contiguous at one distance, and that distance in elements."""
    if tensor.is_contiguous():
        return tensor, cols
    try:
        matrix = tensor.view(-1, cols)
    except RuntimeError:
        return tensor.contiguous(), cols
    return (matrix, matrix.stride(0)) if matrix.stride(1) == 1 else (tensor.contiguous(), cols)


def empty_statistics(like: Tensor, centred: bool, dims: int, x_dtype: torch.dtype) -> Tensor:
    """(1 or 2, *rows): rstd, after the mean if there is one."""
    rows = like.shape[: like.dim() - dims]
    return like.new_empty((2 if centred else 1, *rows), dtype=compute_dtype(x_dtype))


def statistics_pointers(statistics: Tensor | None, centred: bool) -> tuple[int, int]:
    if statistics is None:
        return 0, 0
    first = statistics.data_ptr()
    return (first, first + statistics.nbytes // 2) if centred else (0, first)


def forward(centred, input, residual, weight, bias, dims, *options):
    """(out, summed, statistics); summed is None without a residual."""
    statistics = empty_statistics(input, centred, dims, options[-1])
    return *forward_into(statistics, centred, input, residual, weight, bias, dims, *options), statistics


def forward_into(statistics, centred, input, residual, weight, bias, dims, eps, weight_offset, out_dtype, x_dtype):
    out = _registry.empty_like(input, out_dtype)
    summed = None if residual is None else _registry.empty_like(input, x_dtype)
    count = out.numel()
    if count:
        shape = input.shape
        cols = shape[-1] if dims == 1 else math.prod(shape[len(shape) - dims :])
        input, stride = as_rows(input, cols)
        residual, residual_stride = (None, 0) if residual is None else as_rows(residual, cols)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        mean, rstd = statistics_pointers(statistics, centred)
        index, stream = _registry.place(input)
        table = _registry.native(input)
        (table.layer_norm_forward if centred else table.rms_norm_forward)(
            out.data_ptr(), 0 if summed is None else summed.data_ptr(), mean, rstd,
            input.data_ptr(), 0 if residual is None else residual.data_ptr(),
            0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            count // cols, cols, stride, residual_stride,
            DTYPE_CODES[out_dtype], DTYPE_CODES[x_dtype], DTYPE_CODES[input.dtype],
            0 if residual is None else DTYPE_CODES[residual.dtype],
            0 if weight is None else DTYPE_CODES[weight.dtype],
            eps, weight_offset, index, stream,
        )  # fmt: skip
    return out, summed


def plain_forward(centred, statistics, input, weight, bias, eps):
    """`forward_into` for arguments that are `_norm_checks.plain`."""
    out = _registry.empty_like(input, input.dtype)
    cols = input.size(-1)
    code = DTYPE_CODES[input.dtype]
    mean, rstd = statistics_pointers(statistics, centred)
    index, stream = _registry.place(input)
    table = _registry.native(input)
    (table.layer_norm_forward if centred else table.rms_norm_forward)(
        out.data_ptr(), 0, mean, rstd, input.data_ptr(), 0,
        0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.numel() // cols, cols, cols, 0,
        code, code, code, 0, 0 if weight is None else DTYPE_CODES[weight.dtype],
        eps, 0.0, index, stream,
    )  # fmt: skip
    return out


def plain_backward(centred, grad_out, input, statistics, weight, bias, wants_weight, wants_bias):
    """`backward` for arguments that are `_norm_checks.plain`."""
    grad_out = grad_out.contiguous()
    grad_x = _registry.empty_like(grad_out, grad_out.dtype)
    grad_weight = torch.empty_like(weight) if wants_weight else None
    grad_bias = torch.empty_like(bias) if wants_bias else None
    cols = grad_out.size(-1)
    rows = grad_out.numel() // cols
    code = DTYPE_CODES[grad_out.dtype]
    mean, rstd = statistics_pointers(statistics, centred)
    index, stream = _registry.place(grad_out)
    table = _registry.native(grad_out)
    partials = None
    if (wants_weight or wants_bias) and (blocks := table.norm_backward_blocks(rows, cols, index)):
        partials = torch.empty(blocks * 2 * cols, dtype=statistics.dtype, device=grad_out.device)
    (table.layer_norm_backward if centred else table.rms_norm_backward)(
        grad_x.data_ptr(), 0,
        0 if grad_weight is None else grad_weight.data_ptr(), 0 if grad_bias is None else grad_bias.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        grad_out.data_ptr(), 0, input.data_ptr(), mean, rstd,
        0 if weight is None else weight.data_ptr(), 0,
        rows, cols, cols, 0, cols,
        code, 0, code, 0 if weight is None else DTYPE_CODES[weight.dtype], 0.0, False, index, stream,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def backward(
    centred, grad_out, grad_summed, saved, statistics, weight, bias,
    dims, weight_offset, from_output, x_dtype, cast_dtype, wants_weight, wants_bias,
):  # fmt: skip
    """(grad_x, grad_cast, grad_weight, grad_bias); what does not exist, or is not wanted, is None."""
    grad_x = _registry.empty_like(grad_out, x_dtype)
    grad_cast = None if cast_dtype is None else _registry.empty_like(grad_out, cast_dtype)
    grad_weight = _registry.empty_like(weight, weight.dtype) if wants_weight else None
    grad_bias = _registry.empty_like(bias, bias.dtype) if wants_bias else None
    shape = grad_out.shape
    cols = shape[-1] if dims == 1 else math.prod(shape[len(shape) - dims :])
    if not cols:
        return grad_x, grad_cast, grad_weight, grad_bias
    rows = grad_out.numel() // cols
    index, stream = _registry.place(grad_out)
    table = _registry.native(grad_out)
    partials = None
    if (wants_weight or wants_bias) and (blocks := table.norm_backward_blocks(rows, cols, index)):
        partials = torch.empty(blocks * 2 * cols, dtype=compute_dtype(x_dtype), device=grad_out.device)
    grad_out, grad_out_stride = as_rows(grad_out, cols)
    saved, saved_stride = as_rows(saved, cols)
    statistics = statistics.contiguous()
    grad_summed, grad_summed_stride = (None, 0) if grad_summed is None else as_rows(grad_summed, cols)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    mean, rstd = statistics_pointers(statistics, centred)
    (table.layer_norm_backward if centred else table.rms_norm_backward)(
        grad_x.data_ptr(), 0 if grad_cast is None else grad_cast.data_ptr(),
        0 if grad_weight is None else grad_weight.data_ptr(), 0 if grad_bias is None else grad_bias.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        grad_out.data_ptr(), 0 if grad_summed is None else grad_summed.data_ptr(), saved.data_ptr(), mean, rstd,
        0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        rows, cols, grad_out_stride, grad_summed_stride, saved_stride,
        DTYPE_CODES[x_dtype], 0 if cast_dtype is None else DTYPE_CODES[cast_dtype], DTYPE_CODES[grad_out.dtype],
        0 if weight is None else DTYPE_CODES[weight.dtype],
        weight_offset, from_output, index, stream,
    )  # fmt: skip
    return grad_x, grad_cast, grad_weight, grad_bias
