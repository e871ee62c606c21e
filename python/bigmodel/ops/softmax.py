"""Softmax, and attention's softmax with all that belongs between its two matrix products. Formulas: csrc/ops/softmax.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _softmax_reference
from bigmodel.ops._softmax_reference import Options

# --- checks -----------------------------------------------------------------------------------------------------------


def _check_scores(op: str, scores: Any, inplace: bool, out_dtype: torch.dtype | None) -> None:
    _check.tensor(op, "scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"{op}: scores has shape {tuple(scores.shape)}; accepted is (..., heads, queries, keys).")
    if out_dtype is not None:
        _check.dtype(op, "out_dtype", out_dtype)
    if not isinstance(inplace, bool):
        raise TypeError(f"{op}: inplace must be a bool, got {type(inplace).__name__}.")
    if not inplace:
        return
    if out_dtype not in (None, scores.dtype):
        raise ValueError(f"{op}: out_dtype is {out_dtype}, but inplace=True writes into scores of {scores.dtype}.")
    if scores.requires_grad and scores.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: scores is a leaf that requires grad, which inplace=True would overwrite; pass inplace=False."
        )
    if any(stride == 0 and size > 1 for size, stride in zip(scores.shape, scores.stride(), strict=True)):
        raise ValueError(f"{op}: scores is expanded, so inplace=True would write one element several times.")


def _check_mask(op: str, mask: Any, scores: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a torch.Tensor, got {type(mask).__name__}.")
    if mask.dtype is not torch.bool and mask.dtype not in _check.DTYPE_CODES:
        raise TypeError(
            f"{op}: mask has dtype {mask.dtype}; accepted are bool (True takes part) and, to be added, {_check.SUPPORTED}."
        )
    if mask.layout is not torch.strided or mask.is_nested:
        raise TypeError(f"{op}: mask must be a dense torch.strided tensor, got a nested one or {mask.layout}.")
    if mask.device != scores.device:
        raise ValueError(f"{op}: mask is on device '{mask.device}', but scores is on '{scores.device}'.")
    ends = scores.shape[scores.dim() - mask.dim() :] if mask.dim() <= scores.dim() else None
    if ends is None or any(own not in (1, size) for own, size in zip(mask.shape, ends, strict=True)):
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)}, which does not broadcast to scores' {tuple(scores.shape)}."
        )


def _check_window(op: str, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window must be a pair (left, right), got {window!r}.")
    for size in window:
        if size is not None and (isinstance(size, bool) or not hasattr(size, "__index__")):
            raise TypeError(f"{op}: window is {tuple(window)}; accepted are two integers or None for no limit.")
        if size is not None and size < 0:
            raise ValueError(
                f"{op}: window is {tuple(window)}; neither side may be negative, and no limit is None, not -1."
            )
    return window[0], window[1]


def _check_per_head(op: str, argument: str, value: Any, scores: Tensor) -> None:
    if scores.dim() < 3:
        raise ValueError(
            f"{op}: {argument} needs scores (..., heads, queries, keys), but scores has shape {tuple(scores.shape)}."
        )
    _check.like(op, argument, value, (scores.shape[-3],), "one for each head", scores.device)


def _check_options(op, scores, scale, mask, causal, window, alibi_slopes, softcap, sinks, dropout_p) -> Options:
    _check.number(op, "scale", scale)
    if mask is not None:
        _check_mask(op, mask, scores)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}.")
    left, right = _check_window(op, window)
    if causal:
        right = 0
    if alibi_slopes is not None:
        _check_per_head(op, "alibi_slopes", alibi_slopes, scores)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: alibi_slopes requires grad, but there is no gradient to it; pass it detached.")
    if softcap is not None:
        _check.number(op, "softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"{op}: softcap is {softcap}; it must be greater than 0, or None for no cap.")
        softcap = float(softcap)
    if sinks is not None:
        _check_per_head(op, "sinks", sinks, scores)
    _check.number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it must be at least 0 and less than 1.")
    return Options(float(scale), left, right, softcap, float(dropout_p))


def _check_dim(op: str, input: Any, dim: Any, dtype: Any) -> int:
    """dim counted from the front."""
    _check.tensor(op, "input", input)
    if dtype is not None:
        _check.dtype(op, "dtype", dtype)
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}.")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"{op}: dim is {dim}; input of shape {tuple(input.shape)} has dims {-dims} to {dims - 1}.")
    return int(dim) % dims


# --- public functions -------------------------------------------------------------------------------------------------


def attention_softmax(
    scores: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, alibi_slopes: Tensor | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None, inplace: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(softcap(scale * scores) + mask - slope * distance), and dropout: all that lies between QK^T and V.

    Of query i and key j, with p = i + keys - queries, the key that the query stands at (the last query at the last
    key), in this order:

        z = scale * scores                         softcap: z = softcap * tanh(z / softcap)
        z = z + mask - slope * |p - j|             excluded: mask False or -inf, j > p (causal), j outside the window
        y = exp(z) / (sum of exp(z) over what is not excluded + exp(sink))
        out = y / (1 - dropout_p) with probability 1 - dropout_p, else 0

    A query with nothing to attend to gets zeros, and zero gradients, never NaN (torch's scaled_dot_product_attention
    does the same). Finite masks and scores, finfo.min among them, are ordinary numbers. Nothing outside causal and
    window is read. Arithmetic is float32, or float64 for float64 scores; nothing is rounded between the steps.

    Args:
        scores: (..., heads, queries, keys), float32, bfloat16, float16 or float64, on a CPU or CUDA device. (queries,
            keys) will do where no argument is per head. Any strides: rows that are contiguous are read in place.
        scale: what the scores are multiplied by, say 1 / sqrt(head size).
        mask: broadcast to scores' shape without being expanded. bool: True takes part (as in torch's
            scaled_dot_product_attention; torch.nn.MultiheadAttention means the opposite). Else one of the four float
            dtypes, added in the arithmetic's dtype; it may require grad.
        causal: a query sees no key after p. With queries != keys this is aligned at the bottom right, as in
            FlashAttention and for decoding with a cache; torch's is_causal is aligned at the top left.
        window: (left, right): a query sees the keys from p - left to p + right, both included; None for no limit on a
            side. causal makes right 0.
        alibi_slopes: (heads,), without gradient (Press, Smith, Lewis, arXiv 2108.12409).
        softcap: greater than 0; None for none (Gemma 2, arXiv 2408.00118).
        sinks: (heads,), a logit more in each denominator, which scale, mask and softcap leave alone (gpt-oss, arXiv
            2508.10925); it may require grad.
        dropout_p: in [0, 1). The elements dropped follow from a seed drawn on scores' device by torch's generator
            (Philox4x32-10), so torch.manual_seed repeats them, activation checkpointing sees the same twice, and
            backward computes them again. There are no second derivatives through dropout.
        out_dtype: the result's dtype; None for scores' (float32 under CUDA autocast, as torch's softmax).
        inplace: write the result into scores and return scores. For backward, softcap then keeps a copy of the scores,
            and dropout one of the probabilities.

    Returns:
        A contiguous tensor of scores' shape, or scores itself.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, device or number that does not fit; inplace with a leaf that requires grad.
    """
    op = "attention_softmax"
    _check_scores(op, scores, inplace, out_dtype)
    options = _check_options(op, scores, scale, mask, causal, window, alibi_slopes, softcap, sinks, dropout_p)
    if out_dtype is None:
        out_dtype = scores.dtype if inplace else _registry.autocast_dtype(scores)
    out = _softmax_reference.forward(scores, mask, alibi_slopes, sinks, _seed(scores, dropout_p), options, out_dtype)
    return scores.copy_(out) if inplace else out


def _seed(scores: Tensor, dropout_p: float) -> Tensor | None:
    """64 random bits from torch's generator on the scores' device, for dropout."""
    if not dropout_p:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=scores.device)


def _softmax(op: str, log: bool, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    dim = _check_dim(op, input, dim, dtype)
    function = torch.log_softmax if log else torch.softmax
    return function(input, dim, dtype)


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) along a dimension, with the signature of torch.nn.functional.softmax.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64, on a CPU or CUDA device.
        dim: the dimension to sum over.
        dtype: input is converted to it before anything else, and the result has it; None for input's (float32 under
            CUDA autocast, as in torch).

    Returns:
        A contiguous tensor of input's shape. As in torch, a row of -inf alone gives NaN; attention_softmax gives zeros.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a dimension that input does not have, or a device that is not supported.
    """
    return _softmax("softmax", False, input, dim, dtype)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """input - log(sum(exp(input))) along a dimension, with the signature of torch.nn.functional.log_softmax.

    Everything else is as in `softmax`.
    """
    return _softmax("log_softmax", True, input, dim, dtype)
