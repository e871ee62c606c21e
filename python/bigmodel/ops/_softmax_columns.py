"""Softmax along another dimension than the last: a kernel of its own on a CPU, torch's elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel import _native, _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.ops import _softmax_body, _softmax_checks

_cpu = _native.load().cpu  # CUDA has no such kernel
_NARROW = 16  # columns: the kernel computes 32 side by side, and for 8 of them torch's is faster (docs/decisions.md)


def softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """torch.softmax or torch.log_softmax, which also run what is narrow, traced or not on a CPU."""
    own = input.is_cpu and input.numel() and _registry.direct((input,))
    if not own or math.prod(input.shape[dim + 1 :]) < _NARROW:
        return (torch.log_softmax if log else torch.softmax)(input, dim, dtype)
    if dtype is not None:
        input = input.to(dtype)
    if input.requires_grad and torch.is_grad_enabled():
        return _apply(input, dim, log)
    return _forward(input, dim, log)


def _sizes(shape: torch.Size, dim: int) -> tuple[int, int, int]:
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _forward(input: Tensor, dim: int, log: bool) -> Tensor:
    input = input.contiguous()
    out = _registry.empty_like(input, input.dtype)
    _cpu.softmax_columns_forward(
        out.data_ptr(), input.data_ptr(), *_sizes(input.shape, dim), log, DTYPE_CODES[input.dtype],
        *_registry.place(input),
    )  # fmt: skip
    return out


def _backward(grad_out: Tensor, out: Tensor, dim: int, log: bool) -> Tensor:
    grad_out, out = grad_out.contiguous(), out.contiguous()
    grad = _registry.empty_like(out, out.dtype)
    _cpu.softmax_columns_backward(
        grad.data_ptr(), grad_out.data_ptr(), out.data_ptr(), *_sizes(out.shape, dim), log, DTYPE_CODES[out.dtype],
        *_registry.place(out),
    )  # fmt: skip
    return grad


class _ColumnSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, dim, log):
        out = _forward(input, dim, log)
        ctx.save_for_backward(out)
        ctx.dim, ctx.log = dim, log
        return out

    @staticmethod
    def backward(ctx, grad_out):
        (out,) = ctx.saved_tensors
        _softmax_checks.check_kept_out(grad_out, out)
        if _softmax_body.native_backward(grad_out, out):
            return _backward(grad_out, out, ctx.dim, ctx.log), None, None
        aten = torch.ops.aten
        backward = aten._log_softmax_backward_data if ctx.log else aten._softmax_backward_data
        return backward.default(grad_out, out, ctx.dim, out.dtype), None, None


_apply = _registry.applier(_ColumnSoftmax)
