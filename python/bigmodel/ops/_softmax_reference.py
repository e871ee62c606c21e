"""The softmax ops in torch's own ops, for everything that native code cannot take part in.

Second derivatives, torch.func's transforms, forward-mode AD, batched gradients, tensor subclasses in backward. The
dropout here keeps the same elements as the kernels do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel._native import compute_dtype

_MASK32 = 0xFFFFFFFF


class Options(NamedTuple):
    """The scalars of csrc/ops/softmax.h; None for what is not wanted."""

    scale: float = 1.0
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0


def offsets(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys): key - (query + keys - queries), negative for what lies before the query."""
    query = torch.arange(queries, device=device).unsqueeze(-1)
    return torch.arange(keys, device=device) - (query + (keys - queries))


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product; int64 wraps around, which changes neither."""
    product = word * constant
    return (product >> 32) & _MASK32, product & _MASK32


def philox(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """The four words of Philox4x32-10 at each counter (Salmon et al., SC 2011), as int64."""
    zero = torch.zeros_like(counter)
    c = [counter & _MASK32, counter >> 32, zero, zero]
    k = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c[0])
        high1, low1 = _multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & _MASK32, (k[1] + 0xBB67AE85) & _MASK32]
    return c


def kept(seed: Tensor, shape: torch.Size, dropout_p: float) -> Tensor:
    """Which elements dropout keeps, of a tensor of this shape."""
    keys = shape[-1]
    blocks = (keys + 3) // 4
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    words = torch.stack(philox(seed, torch.arange(rows * blocks, device=seed.device)), -1)
    return (words.view(*shape[:-1], blocks * 4) >= threshold(dropout_p))[..., :keys]


def threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)


def factors(seed: Tensor | None, like: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies each element by."""
    return 1.0 if seed is None else kept(seed, like.shape, dropout_p).to(like.dtype) / (1 - dropout_p)


def forward(scores, mask, slopes, sinks, seed, options: Options, out_dtype):
    """`attention_softmax` in torch's own ops."""
    scale, left, right, softcap, dropout_p = options
    compute = compute_dtype(scores.dtype)
    z = scores.to(compute) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if mask is not None:
        live = mask if mask.dtype is torch.bool else mask != -torch.inf
        z = torch.where(live, z if mask.dtype is torch.bool else z + mask.to(compute), -torch.inf)
    if slopes is not None or left is not None or right is not None:
        offset = offsets(scores.shape[-2], scores.shape[-1], scores.device)
        if slopes is not None:
            z = z - slopes.to(compute)[:, None, None] * offset.abs()
        if left is not None:
            z = z.masked_fill(offset < -left, -torch.inf)
        if right is not None:
            z = z.masked_fill(offset > right, -torch.inf)
    if not z.shape[-1]:
        return z.to(out_dtype)
    peak = z.detach().amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(compute)[:, None, None]
        peak = torch.maximum(peak, sinks.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    e = torch.exp(z - peak)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    y = e / torch.where(total == 0, 1.0, total)
    return (y * factors(seed, y, dropout_p)).to(out_dtype)


def backward(grad_out, y, scores, seed, options: Options, scores_dtype, mask_shape, wants_sinks):
    """(grad_scores, grad_mask, grad_sinks) in torch's own ops, for gradients that need one themselves."""
    scale, _, _, softcap, dropout_p = options
    compute = compute_dtype(scores_dtype)
    y = y.to(compute)
    g = grad_out.to(compute) * factors(seed, y, dropout_p)
    d = (g * y).sum(-1, keepdim=True)
    grad_z = y * (g - d)
    grad_scores = grad_z * scale
    if softcap is not None:
        slope = 1 - torch.tanh(scores.to(compute) * (scale / softcap)).square()
        grad_scores = torch.where(grad_z == 0, 0.0, grad_scores * slope)  # an excluded score may be NaN
    grad_mask = None if mask_shape is None else grad_z.sum_to_size(mask_shape)
    grad_sinks = None
    if wants_sinks:
        # The sink's own share is what the others leave; of a row without any it does not matter, since d is 0.
        share = -(1 - y.sum(-1, keepdim=True)) * d
        grad_sinks = share.sum([dim for dim in range(-share.dim(), 0) if dim != -3])
    return grad_scores.to(scores_dtype), grad_mask, grad_sinks


def plain_forward(input, log, out_dtype):
    function = torch.log_softmax if log else torch.softmax
    return function(input.to(compute_dtype(input.dtype)), -1).to(out_dtype)


def plain_backward(grad_out, out, log, input_dtype):
    compute = compute_dtype(input_dtype)
    g, y = grad_out.to(compute), out.to(compute)
    if log:
        return (g - torch.exp(y) * g.sum(-1, keepdim=True)).to(input_dtype)
    return (y * (g - (g * y).sum(-1, keepdim=True))).to(input_dtype)
