"""The native calls of the softmax ops: allocate what is returned, then one call. Nothing is checked here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel._native import DTYPE_CODES, compute_dtype
from bigmodel.ops._softmax_reference import Options

_UNLIMITED = 2**63 - 1  # kUnlimited
_BOOL = -1  # kBool
_DIMS = 5  # what the kernels know: two of batches, heads, queries, keys


def native_backward(*tensors: Tensor | None) -> bool:
    """Whether the native backward may run: no second derivative is wanted, and hooks and vmap left plain tensors.

    The gradient comes first.
    """
    return not torch.is_grad_enabled() and _registry.direct(tensors) and not _registry.batched(tensors[0])


def _padded(values: Sequence[int], with_: int) -> tuple[int, ...]:
    return (with_,) * (_DIMS - len(values)) + tuple(values)


def _strides(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Of the dimensions before the last one and of the last, in elements; 0 where a size of 1 is broadcast."""
    strides = _padded([0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)], 0)
    return strides[:-1], strides[-1]


def _folded(tensor: Tensor) -> Tensor:
    """With no more dimensions than the kernels know: the first ones as one, copied where that cannot be a view."""
    extra = tensor.dim() - _DIMS
    return tensor.flatten(0, extra) if extra > 0 else tensor


def _folded_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """As `_folded`; only a mask that is broadcast over a part of the folded dimensions is expanded in memory."""
    extra = len(shape) - _DIMS
    own = mask.dim() - (_DIMS - 1)
    if extra <= 0 or own <= 0:
        return mask
    if all(size == 1 for size in mask.shape[:own]):
        return mask.reshape(mask.shape[own:])
    return mask.expand(*shape[: extra + 1], *mask.shape[own:]).flatten(0, extra)


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its keys do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _per_head(values: Tensor | None, compute: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(compute).contiguous()


def _rows(shape: Sequence[int], seed: Tensor | None, options: Options, log: bool) -> tuple:
    """SoftmaxRows of csrc/ops/softmax.h."""
    scale, left, right, softcap, dropout_p = options
    dims = _padded(shape, 1)
    *_, queries, keys = dims
    left = _UNLIMITED if left is None or left >= keys else left
    right = _UNLIMITED if right is None or right >= queries else right
    return dims[:-1], keys, left, right, _registry.pointer(seed), scale, softcap or 0.0, dropout_p, log


def forward(
    scores: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    options: Options, out_dtype: torch.dtype, inplace: bool = False, log: bool = False, empty_is_nan: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(out, probs, sink_probs): probs are y before dropout, None without; sink_probs None without sinks."""
    # Dimensions that do not fold into a view would be written to a copy of theirs.
    rows_in_place = inplace and scores.stride(-1) == 1 and _folded(scores).data_ptr() == scores.data_ptr()
    out = scores if rows_in_place else _registry.empty_like(scores, out_dtype)
    probs = None if seed is None else _registry.empty_like(scores, out_dtype)
    compute = compute_dtype(scores.dtype)
    sink_probs = None if sinks is None else scores.new_empty(scores.shape[:-1], dtype=compute)
    if out.numel():
        source, target = _folded(_with_rows(scores)), _folded(out)
        mask = None if mask is None else _folded_mask(mask, scores.shape)
        mask_strides, mask_key_stride = ((0, 0, 0, 0), 0) if mask is None else _strides(mask)
        mask_code = 0 if mask is None else _BOOL if mask.dtype is torch.bool else DTYPE_CODES[mask.dtype]
        slopes, sinks = _per_head(slopes, compute), _per_head(sinks, compute)
        index, stream = _registry.place(scores)
        _registry.native(scores).attention_softmax_forward(
            *map(_registry.pointer, (target, probs, sink_probs, source, mask, slopes, sinks)),
            _rows(source.shape, seed, options, log), _strides(target)[0], _strides(source)[0],
            mask_strides, mask_key_stride, DTYPE_CODES[out_dtype], DTYPE_CODES[scores.dtype], mask_code,
            empty_is_nan, index, stream,
        )  # fmt: skip
    if inplace and not rows_in_place:
        scores.copy_(out)
        out = scores
    return out, probs, sink_probs


def backward(
    grad_out: Tensor, saved: Tensor, scores: Tensor | None, sink_probs: Tensor | None, seed: Tensor | None,
    options: Options, scores_dtype: torch.dtype, mask_shape: Sequence[int] | None, wants_sinks: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_scores, grad_mask, grad_sinks), the last two in the arithmetic's dtype and None where not wanted."""
    shape, compute = saved.shape, compute_dtype(scores_dtype)
    grad_scores = _registry.empty_like(saved, scores_dtype)
    if not saved.numel():
        grad_mask = None if mask_shape is None else saved.new_zeros(mask_shape, dtype=compute)
        return grad_scores, grad_mask, saved.new_zeros(shape[-3], dtype=compute) if wants_sinks else None
    grad_out, saved = _folded(_with_rows(grad_out)), _folded(saved.contiguous())
    scores = None if scores is None else _folded(_with_rows(scores))
    summed: tuple[int, ...] = () if mask_shape is None else tuple(mask_shape)
    if len(shape) > _DIMS and len(summed) >= _DIMS:
        # Folded, the mask would have to be expanded: so its gradient is taken unsummed there, and summed at the end.
        summed = (math.prod(shape[: len(shape) - _DIMS + 1]), *summed[len(summed) - _DIMS + 1 :])
    mask_dims = _padded(summed, 1)
    grad_mask = None if mask_shape is None else saved.new_empty(summed, dtype=compute)
    grad_sinks = saved.new_empty(shape[-3], dtype=compute) if wants_sinks else None
    index, stream = _registry.place(saved)
    native = _registry.native(saved)
    rows, keys = saved.numel() // shape[-1], shape[-1]
    size = native.softmax_backward_scratch(rows, keys, grad_mask is not None, wants_sinks, index)
    scratch = saved.new_empty(size, dtype=compute) if size else None
    native.attention_softmax_backward(
        *map(_registry.pointer, (grad_scores, grad_mask, grad_sinks, scratch, grad_out, saved, scores, sink_probs)),
        _rows(saved.shape, seed, options, False), _strides(grad_out)[0],
        (0, 0, 0, 0) if scores is None else _strides(scores)[0], mask_dims[:-1], mask_dims[-1],
        DTYPE_CODES[saved.dtype], DTYPE_CODES[scores_dtype], index, stream,
    )  # fmt: skip
    if grad_mask is not None and mask_shape is not None and grad_mask.shape != torch.Size(mask_shape):
        outer = shape[: len(shape) - _DIMS + 1]
        grad_mask = grad_mask.view(*outer, *summed[1:]).sum_to_size(mask_shape)
    return grad_scores, grad_mask, grad_sinks


def plain_forward(input: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """softmax or log_softmax over the last dimension, which `input` has."""
    if not input.is_contiguous() or not input.numel():
        options = Options()
        return forward(input, None, None, None, None, options, out_dtype, log=log, empty_is_nan=True)[0]
    out = _registry.empty_like(input, out_dtype)
    cols = input.size(-1)
    index, stream = _registry.place(input)
    _registry.native(input).softmax_forward(
        out.data_ptr(), input.data_ptr(), out.numel() // cols, cols, log,
        DTYPE_CODES[out_dtype], DTYPE_CODES[input.dtype], index, stream,
    )  # fmt: skip
    return out


def plain_backward(grad_out: Tensor, out: Tensor, log: bool, input_dtype: torch.dtype) -> Tensor:
    grad = _registry.empty_like(out, input_dtype)
    if grad.numel():
        grad_out, out = grad_out.contiguous(), out.contiguous()
        cols = out.size(-1)
        index, stream = _registry.place(out)
        _registry.native(out).softmax_backward(
            grad.data_ptr(), grad_out.data_ptr(), out.data_ptr(), grad.numel() // cols, cols, log,
            DTYPE_CODES[out.dtype], DTYPE_CODES[input_dtype], index, stream,
        )  # fmt: skip
    return grad
