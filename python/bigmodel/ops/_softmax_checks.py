"""What the softmax ops accept: each failure is one sentence that names the op and the argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _check
from bigmodel._native import compute_dtype
from bigmodel.ops._softmax_reference import Options


class Scores(NamedTuple):
    """What options are checked against: of scores, or of those that a product is going to give."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def check_scores(op: str, scores: Any, inplace: bool, out_dtype: torch.dtype | None) -> None:
    _check.tensor(op, "scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"{op}: scores has shape {tuple(scores.shape)}; accepted is (..., heads, queries, keys).")
    if out_dtype is not None:
        _check.dtype(op, "out_dtype", out_dtype)
    _check.flag(op, "inplace", inplace)
    if not inplace:
        return
    if out_dtype not in (None, scores.dtype):
        raise ValueError(f"{op}: out_dtype is {out_dtype}, but inplace=True writes into scores of {scores.dtype}.")
    if torch.is_grad_enabled():
        leaf = scores if torch.compiler.is_compiling() or scores._base is None else scores._base
        if leaf.requires_grad and leaf.is_leaf:
            what = "a leaf" if leaf is scores else "a view of a leaf"
            raise ValueError(
                f"{op}: scores is {what} that requires grad, which inplace=True would overwrite; pass inplace=False."
            )
    if not scores.is_contiguous():
        _check_apart(op, scores)


def _check_apart(op: str, scores: Tensor) -> None:
    reach = 0
    for stride, size in sorted(zip(scores.stride(), scores.shape, strict=True)):
        if size > 1 and stride <= reach:
            what = "is expanded" if stride == 0 else f"has overlapping elements (strides {scores.stride()})"
            raise ValueError(f"{op}: scores {what}, so inplace=True would write one element several times.")
        reach += (size - 1) * stride


def check_mask(op: str, argument: str, mask: Any, scores: Tensor | Scores) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(mask).__name__}.")
    if mask.dtype is not torch.bool and mask.dtype not in _check.DTYPE_CODES:
        raise TypeError(
            f"{op}: {argument} has dtype {mask.dtype}; accepted are bool (True takes part) and, added, "
            f"{_check.SUPPORTED}."
        )
    _check.no_wider(op, argument, mask, scores)
    if mask.layout is not torch.strided or mask.is_nested:
        raise TypeError(f"{op}: {argument} must be a dense torch.strided tensor, got a nested one or {mask.layout}.")
    if mask.device != scores.device:
        raise ValueError(f"{op}: {argument} is on device '{mask.device}', but the scores are on '{scores.device}'.")
    shape = tuple(scores.shape)
    ends = zip(mask.shape[::-1], shape[::-1], strict=False)
    if mask.dim() > len(shape) or any(own not in (1, size) for own, size in ends):
        raise ValueError(
            f"{op}: {argument} has shape {tuple(mask.shape)}, which does not broadcast to the scores' {shape}."
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
                f"{op}: window is {tuple(window)}; neither side may be negative, and FlashAttention's -1 for no limit "
                "is None here."
            )
    return window[0], window[1]


def _check_per_head(op: str, argument: str, value: Any, scores: Tensor | Scores) -> None:
    if len(scores.shape) < 3:
        raise ValueError(
            f"{op}: {argument} needs scores (..., heads, queries, keys), but scores has shape {tuple(scores.shape)}."
        )
    _check.like(op, argument, value, (scores.shape[-3],), "one for each head", scores.device)
    _check.no_wider(op, argument, value, scores)


def check_options(op, scores, scale, mask, causal, window, alibi_slopes, softcap, sinks, dropout_p) -> Options:
    _check.number(op, "scale", scale)
    if mask is not None:
        check_mask(op, "mask", mask, scores)
    _check.flag(op, "causal", causal)
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


# --- backward ---------------------------------------------------------------------------------------------------------


def check_kept_out(grad_out: Tensor, out: Tensor) -> None:
    """Hooks on saved tensors may give back anything; quick where they did not."""
    if out.dtype is not grad_out.dtype or out.shape != grad_out.shape or out.device != grad_out.device:
        _check.kept("softmax", "result", out, grad_out.shape, grad_out.dtype, grad_out.device)


def check_kept(op, grad_out, y, scores, sink_probs, seed, scores_dtype) -> None:
    shape, device = grad_out.shape, grad_out.device
    _check.kept(op, "result", y, shape, grad_out.dtype, device)
    if scores is not None:
        _check.kept(op, "scores", scores, shape, scores_dtype, device)
    if sink_probs is not None:
        _check.kept(op, "probabilities of the sinks", sink_probs, shape[:-1], compute_dtype(scores_dtype), device)
    if seed is not None:
        _check.kept(op, "seed", seed, seed.shape if seed.numel() == 1 else (), torch.int64, device)


def check_out(op: str, grad_out: Any, out: Any, argument: str) -> None:
    """The first arguments of a registered backward op, which anybody may call."""
    _check.tensor(op, "grad_out", grad_out)
    if not grad_out.dim():
        raise ValueError(f"{op}: grad_out has no dimension; there must be one to sum over.")
    _check.exactly(op, argument, out, grad_out.shape, "grad_out", grad_out.dtype, grad_out.device)


def check_seed(op: str, seed: Any, dropout_p: float, like: Tensor) -> None:
    if (seed is None) != (dropout_p == 0):
        raise ValueError(f"{op}: seed must be there with dropout_p > 0, and only then; dropout_p is {dropout_p}.")
    if seed is not None and (seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != like.device):
        raise ValueError(
            f"{op}: seed is {seed.dtype} with {seed.numel()} elements on '{seed.device}'; it must be one int64 element "
            f"on '{like.device}'."
        )


def check_backward(
    op, grad_out, saved, scores, sink_probs, seed, options: Options, scores_dtype, mask_shape, wants_sinks
) -> None:
    """The arguments of the registered backward op."""
    check_out(op, grad_out, saved, "saved")
    _check.dtype(op, "scores_dtype", scores_dtype)
    shape, device = tuple(grad_out.shape), grad_out.device
    if len(shape) < 2 or (wants_sinks and len(shape) < 3):
        raise ValueError(f"{op}: grad_out has shape {shape}; accepted is (..., heads, queries, keys).")
    check_seed(op, seed, options.dropout_p, grad_out)
    check_options(op, grad_out, options.scale, None, False, (options.left, options.right), None, options.softcap, None,
                  options.dropout_p)  # fmt: skip
    for argument, value, wanted in (("scores", scores, options.softcap is not None),
                                    ("sink_probs", sink_probs, wants_sinks)):  # fmt: skip
        if wanted and value is None:
            raise ValueError(f"{op}: {argument} is None, but softcap and wants_sinks need scores and sink_probs.")
    if scores is not None:
        _check.exactly(op, "scores", scores, shape, "grad_out", scores_dtype, device)
    if sink_probs is not None:
        compute = compute_dtype(scores_dtype)
        _check.exactly(op, "sink_probs", sink_probs, shape[:-1], "one for each query", compute, device)
    if mask_shape is not None:
        own = tuple(mask_shape)
        ends = zip(own[::-1], shape[::-1], strict=False)
        if len(own) > len(shape) or any(size not in (1, whole) for size, whole in ends):
            raise ValueError(f"{op}: mask_shape is {own}, which does not broadcast to grad_out's {shape}.")


def check_dim(op: str, input: Any, dim: Any, dtype: Any) -> int:
    """dim counted from the front."""
    _check.tensor(op, "input", input)
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}.")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"{op}: dim is {dim}; input of shape {tuple(input.shape)} has dims {-dims} to {dims - 1}.")
    if dtype is not None:
        _check.dtype(op, "dtype", dtype)
    return int(dim) % dims
