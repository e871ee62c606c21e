"""Softmax along another dimension than the last: torch's kernel, on a CPU into memory that is kept between calls."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel.ops import _softmax_body

_aten = torch.ops.aten


def softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """torch.softmax or torch.log_softmax; what is small, strided or to be converted is theirs in memory too."""
    own = _registry.direct((input,)) and dtype in (None, input.dtype)
    if not (own and _registry.is_kept(input) and input.is_contiguous()):
        return (torch.log_softmax if log else torch.softmax)(input, dim, dtype)
    if input.requires_grad and torch.is_grad_enabled():
        return _apply(input, dim, log)
    return _forward(input, dim, log)


def _forward(input: Tensor, dim: int, log: bool) -> Tensor:
    forward = _aten._log_softmax.out if log else _aten._softmax.out
    return forward(input, dim, False, out=_registry.empty_like(input, input.dtype))


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
        backward = _aten._log_softmax_backward_data if ctx.log else _aten._softmax_backward_data
        if not _softmax_body.native_backward(grad_out, out):
            return backward.default(grad_out, out, ctx.dim, out.dtype), None, None
        into = {"out" if ctx.log else "grad_input": _registry.empty_like(out, out.dtype)}
        return backward.out(grad_out.contiguous(), out.contiguous(), ctx.dim, out.dtype, **into), None, None


_apply = _registry.applier(_ColumnSoftmax)
