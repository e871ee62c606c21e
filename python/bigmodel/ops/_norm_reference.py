"""The normalisation ops in torch's own ops, for everything that native code cannot take part in.

Second derivatives, torch.func's transforms, forward-mode AD, batched gradients, tensor subclasses in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel._native import compute_dtype


def forward(centred, x, weight, bias, dims, eps, weight_offset, out_dtype):
    """The formula in torch's own ops, for second derivatives and torch.func's transforms."""
    axes = tuple(range(-dims, 0))
    x = x.to(compute_dtype(x.dtype))
    if centred:
        x = x - x.mean(axes, keepdim=True)
    out = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.to(x.dtype) + weight_offset)
    return (out if bias is None else out + bias.to(x.dtype)).to(out_dtype)


def wide_sum(input: Tensor, residual: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(input.dtype, residual.dtype), torch.float32)
    return input.to(wide) + residual.to(wide)


def backward(centred, grad_out, grad_summed, x, weight, dims, eps, weight_offset, wants_weight, wants_bias):
    """(grad_x, grad_weight, grad_bias) in torch's own ops, x's part in the dtype of the statistics.

    For gradients that need one themselves, and where what arrives in backward is no plain tensor: batched, a subclass.
    """
    axes = tuple(range(-dims, 0))
    rows = tuple(range(x.dim() - dims))
    wide = x.to(compute_dtype(x.dtype))
    dy = grad_out.to(wide.dtype)
    if centred:
        wide = wide - wide.mean(axes, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)
    xhat = wide * rstd
    g = dy if weight is None else dy * (weight.to(wide.dtype) + weight_offset)
    grad_x = g - xhat * (g * xhat).mean(axes, keepdim=True)
    grad_x = rstd * (grad_x - g.mean(axes, keepdim=True) if centred else grad_x)
    if grad_summed is not None:
        grad_x = grad_x + grad_summed
    grad_weight = (dy * xhat).sum(rows).to(weight.dtype) if wants_weight else None
    grad_bias = dy.sum(rows) if wants_bias else None
    return grad_x, grad_weight, grad_bias
