"""softmax(Q K^T) V with everything that `bigmodel.attention_softmax` knows, by one of two paths.

`_choose` decides between torch's scaled_dot_product_attention, which never stores the weights, and two matrix products
around the fused softmax, which runs in place in their scores. `attention.explain` says what it decided and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bigmodel import _check, _registry, ops
from bigmodel.ops._softmax_checks import Scores, check_mask, check_options

_SDPA_MASK_DIMS = (2, 4)


class Path(NamedTuple):
    """Which way a call of `attention` takes ("sdpa" or "fused"), and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_inputs(op: str, query: Any, key: Any, value: Any, enable_gqa: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check.tensor(op, name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; accepted is (..., heads, length, size).")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} is on device '{tensor.device}', but query is on '{query.device}'.")
        if tensor.dtype is not query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, but query has {query.dtype}.")
    _check.flag(op, "enable_gqa", enable_gqa)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{op}: key has head size {key.shape[-1]}, but query has {query.shape[-1]}.")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{op}: value has {value.shape[-2]} positions, but key has {key.shape[-2]}.")
    if enable_gqa:
        _check_groups(op, query, key, value)
        return
    try:
        torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            f"{op}: query, key and value have shapes {shapes}; batches and heads must broadcast, or enable_gqa be True."
        ) from None


def _check_groups(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError(f"{op}: enable_gqa needs query, key and value of shape (..., heads, length, size).")
    heads, shared = query.shape[-3], key.shape[-3]
    if value.shape[-3] != shared or not shared or heads % shared:
        raise ValueError(
            f"{op}: with enable_gqa, query has {heads} heads, key {shared} and value {value.shape[-3]}; "
            "key and value must have as many, and query a multiple of it."
        )


def _scores(query: Tensor, key: Tensor, enable_gqa: bool) -> Scores:
    """Of query @ key^T."""
    if enable_gqa:
        heads = (*torch.broadcast_shapes(query.shape[:-3], key.shape[:-3]), query.shape[-3])
    else:
        heads = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return Scores(torch.Size((*heads, query.shape[-2], key.shape[-2])), _product_dtype(query), query.device)


# --- the choice -------------------------------------------------------------------------------------------------------


def _choose(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    enable_gqa: bool, return_weights: bool, options: dict[str, Any],
) -> Path:  # fmt: skip
    against = _not_the_same(query, key, attn_mask, is_causal, return_weights, options)
    against = against or _no_kernel(query, key, value, attn_mask, dropout_p, enable_gqa)
    if against:
        return Path("fused", against)
    return Path("sdpa", "torch's scaled_dot_product_attention computes the same without storing the weights")


def _not_the_same(query, key, attn_mask, is_causal, return_weights, options) -> str:
    """What torch's scaled_dot_product_attention would not compute, or ""."""
    queries, keys = query.shape[-2], key.shape[-2]
    absent = [name for name, option in options.items() if option is not None]
    if absent:
        return f"torch's scaled_dot_product_attention has no {', '.join(absent)}"
    if return_weights:
        return "torch's scaled_dot_product_attention returns no weights"
    if is_causal and attn_mask is not None:
        return "torch's scaled_dot_product_attention takes attn_mask or is_causal, not both"
    if is_causal and queries not in (1, keys):
        return f"torch's is_causal is aligned at the top left, another mask with {queries} queries and {keys} keys"
    return ""


def _no_kernel(query, key, value, attn_mask, dropout_p, enable_gqa) -> str:
    """Why torch's scaled_dot_product_attention would itself compose matrix products and a softmax, or ""."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return "torch's kernels take four dimensions"
    if not (query.numel() and key.numel() and value.numel()):
        return "a tensor is empty"
    leading = [tensor.shape[: 1 if enable_gqa else 2] for tensor in (query, key, value)]
    if not leading[0] == leading[1] == leading[2]:
        return "torch's kernels do not broadcast"
    if value.shape[-1] != query.shape[-1]:
        return "torch's kernels take values of the queries' size"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires grad"
    if attn_mask is not None and attn_mask.dim() not in _SDPA_MASK_DIMS:
        return "torch's kernels take masks of two or four dimensions"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, _product_dtype(query)):
        return "torch's kernels take masks of bool or the queries' dtype"
    if query.is_cuda and attn_mask is not None:  # NaN in backward: pytorch issues 178251 and 196678 (2.11 and later)
        return "torch's CUDA kernels promise nothing about queries that a mask leaves without keys"
    if query.is_cuda:
        return "torch's CUDA kernels know no float64" if query.dtype is torch.float64 else ""
    return "torch's CPU kernel knows no dropout" if dropout_p else ""


# --- two matrix products around the softmax ---------------------------------------------------------------------------


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, weights)."""
    if _product_dtype(query) is torch.float16:  # whose unscaled scores could pass 65504
        query, scale = query * scale, 1.0
    scores = _grouped_matmul(query, key.transpose(-2, -1))
    read = (scores, attn_mask, options["alibi_slopes"], options["sinks"])
    # The scores are nobody else's, and the product's backward does not need them; soft-capping's does.
    keeps_scores = options["softcap"] is not None and torch.is_grad_enabled() and _registry.requires_grad(read)
    weights = ops.attention_softmax(
        scores, scale=scale, mask=attn_mask, causal=is_causal, dropout_p=dropout_p, out_dtype=scores.dtype,
        inplace=_registry.direct(read) and not keeps_scores, **options,
    )  # fmt: skip
    return _grouped_matmul(weights, value), weights


def _product_dtype(query: Tensor) -> torch.dtype:
    """What a matrix product with the queries is taken in: autocast has it in a type of its own, but for float64."""
    kind = query.device.type
    known = (query.is_cpu or query.is_cuda) and query.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else query.dtype


def _grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, where each head of the right serves several of the left without being repeated in memory."""
    if left.dim() < 3 or right.dim() < 3:
        return left @ right
    heads, shared = left.shape[-3], right.shape[-3]
    if heads <= shared or shared == 0:
        return left @ right
    rows = left.shape[-2]
    out = left.reshape(*left.shape[:-3], shared, heads // shared * rows, left.shape[-1]) @ right
    # Not a view in autograd's eyes, as with matmul's own result, so that writing in place costs no as_strided.
    return torch.ops.aten._unsafe_view.default(out, [*out.shape[:-3], heads, rows, out.shape[-1]])


# --- public functions -------------------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, softcap: float | None = None,
    sinks: Tensor | None = None, window: Sequence[int | None] | None = None, alibi_slopes: Tensor | None = None,
    return_weights: bool = False,
) -> Any:  # fmt: skip
    """dropout(softmax(scale * query @ key^T, with all options of `attention_softmax`)) @ value.

    The first arguments are those of torch.nn.functional.scaled_dot_product_attention. With queries != keys, is_causal
    differs from torch's: here the last query sees the last key (bottom right), as when decoding with a cache and in
    FlashAttention; torch aligns at the top left. A query with nothing to attend to gives zeros and zero gradients.

    Two paths lead to the result, and `bigmodel.attention.explain` tells for the same arguments which one and why:
    "sdpa" is torch's scaled_dot_product_attention, taken where it computes the same and has a kernel for it; "fused"
    is two matrix products with `attention_softmax` in place between them, which stores the weights: as many elements
    as heads * queries * keys. docs/attention.md has the whole list. They differ in rounding, and in which elements
    dropout drops.

    Args:
        query: (..., heads, queries, size), float32, bfloat16, float16 or float64, on a CPU or CUDA device.
        key: (..., heads, keys, size).
        value: (..., heads, keys, value size). Batches and heads broadcast.
        attn_mask: broadcast to (..., heads, queries, keys). bool: True takes part; else added, and may require grad.
        dropout_p: in [0, 1), applied to the weights whatever the mode: pass 0.0 in evaluation, as with torch.
        is_causal: a query sees no key after its own; together with attn_mask, both hold.
        scale: what the scores are multiplied by; None for 1 / sqrt(size).
        enable_gqa: heads of query may be a multiple of those of key and value, which are not repeated in memory.
        softcap, sinks, window, alibi_slopes: as in `attention_softmax`; sinks and alibi_slopes are one per query head.
        return_weights: return (out, weights).

    Returns:
        (..., heads, queries, value size) in query's dtype (autocast's under autocast); with return_weights also the
        weights after dropout, (..., heads, queries, keys).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, device or number that does not fit.
    """
    options = _options(softcap, sinks, window, alibi_slopes)
    path = _checked_path(
        "attention", query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_weights, options
    )
    if path.name == "sdpa":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal and query.shape[-2] > 1, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    out, weights = _fused(query, key, value, attn_mask, dropout_p, is_causal, scale, options)
    return (out, weights) if return_weights else out


def _options(softcap: Any, sinks: Any, window: Any, alibi_slopes: Any) -> dict[str, Any]:
    if isinstance(window, (tuple, list)) and list(window) == [None, None]:
        window = None
    return {"softcap": softcap, "sinks": sinks, "window": window, "alibi_slopes": alibi_slopes}


def _checked_path(
    op, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_weights, options
) -> Path:
    _check_inputs(op, query, key, value, enable_gqa)
    _check.flag(op, "is_causal", is_causal)
    _check.flag(op, "return_weights", return_weights)
    scores = _scores(query, key, enable_gqa)
    if attn_mask is not None:
        check_mask(op, "attn_mask", attn_mask, scores)
    check_options(
        op, scores, scale=1.0 if scale is None else scale, mask=None, causal=is_causal, dropout_p=dropout_p, **options
    )
    return _choose(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, return_weights, options)


def explain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, softcap: float | None = None,
    sinks: Tensor | None = None, window: Sequence[int | None] | None = None, alibi_slopes: Tensor | None = None,
    return_weights: bool = False,
) -> Path:  # fmt: skip
    """The path that `attention` takes with these arguments, and why, as (name, reason); nothing is computed.

    Raises what `attention` would raise.
    """
    options = _options(softcap, sinks, window, alibi_slopes)
    return _checked_path(
        "attention.explain", query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_weights,
        options,
    )  # fmt: skip


attention.explain = explain  # type: ignore[attr-defined]
