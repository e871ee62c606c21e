"""Attention's modules: its softmax alone, and torch.nn.MultiheadAttention through `bigmodel.attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from bigmodel import _check, ops
from bigmodel._attention import attention
from bigmodel.nn.position import alibi_slopes
from bigmodel.ops._softmax_checks import check_options, check_scores


class AttentionSoftmax(torch.nn.Module):
    """`bigmodel.attention_softmax` as a module: what lies between QK^T and V.

    Args:
        num_heads: needed for alibi and sinks only.
        scale, causal, window, softcap, out_dtype, inplace: as in `attention_softmax`.
        alibi: with the slopes of `alibi_slopes(num_heads)`, a buffer outside the state_dict.
        sinks: with a learned logit per head in the denominator, the parameter `sinks` of shape (num_heads,), zeros.
        dropout_p: as in `attention_softmax`, in training only.

    Raises:
        TypeError, ValueError: what `attention_softmax` would raise in a training step.

    Shapes: scores (..., heads, queries, keys), mask broadcast to that (bool: True takes part), output as scores.
    """

    sinks: Parameter | None
    alibi_slopes: Tensor | None

    def __init__(
        self, num_heads: int | None = None, *, scale: float = 1.0, causal: bool = False,
        window: tuple[int | None, int | None] | None = None, alibi: bool = False, softcap: float | None = None,
        sinks: bool = False, dropout_p: float = 0.0, out_dtype: torch.dtype | None = None, inplace: bool = False,
        device=None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "AttentionSoftmax"
        _check_softmax(op, scale, causal, window, softcap, dropout_p, out_dtype, inplace)
        _check.flag(op, "alibi", alibi)
        _check.flag(op, "sinks", sinks)
        if num_heads is not None and (isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1):
            raise ValueError(f"{op}: num_heads is {num_heads!r}; it must be a positive integer, or None.")
        if num_heads is None and (alibi or sinks):
            raise ValueError("AttentionSoftmax: num_heads is None, but alibi and sinks are one value for each head.")
        self.scale = scale
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.out_dtype = out_dtype
        self.inplace = inplace
        self.register_parameter(
            "sinks", Parameter(torch.empty(num_heads or 0, device=device, dtype=dtype)) if sinks else None
        )
        self.register_buffer("alibi_slopes", alibi_slopes(num_heads or 0, device) if alibi else None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.sinks is not None:
            torch.nn.init.zeros_(self.sinks)
        if self.alibi_slopes is not None:
            self.alibi_slopes.copy_(alibi_slopes(len(self.alibi_slopes)))

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.attention_softmax(
            scores, scale=self.scale, mask=mask, causal=self.causal, window=self.window,
            alibi_slopes=self.alibi_slopes, softcap=self.softcap, sinks=self.sinks,
            dropout_p=self.dropout_p if self.training else 0.0, out_dtype=self.out_dtype, inplace=self.inplace,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = {
            "causal": False,
            "window": None,
            "softcap": None,
            "dropout_p": 0.0,
            "out_dtype": None,
            "inplace": False,
        }
        shown = [f"{name}={getattr(self, name)}" for name, default in options.items() if getattr(self, name) != default]
        shown += [name for name in ("alibi_slopes", "sinks") if getattr(self, name) is not None]
        return ", ".join([f"scale={self.scale:g}", *shown])


def _check_softmax(op: str, scale, causal, window, softcap, dropout_p, out_dtype, inplace) -> None:
    """Refuses before the first call what a training step would."""
    nothing = torch.empty(1, 0, 0, device="meta")
    check_scores(op, nothing, False, out_dtype)
    _check.flag(op, "inplace", inplace)
    check_options(op, nothing, scale, None, causal, window, None, softcap, None, dropout_p)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention through `bigmodel.attention`: its arguments, parameters and state_dict.

    A query with nothing to attend to gets weights of zero and so `out_proj`'s bias, where torch.nn's gives NaN.
    Dropout drops other elements than torch.nn's. A mask together with is_causal is not read where queries and keys
    are as many: the hint is believed, as in torch.nn. docs/attention.md says what nested tensors and
    torch.nn.TransformerEncoderLayer's fast path do.

    Args: as in torch.nn.MultiheadAttention.

    Shapes: query (queries, batch, embed_dim), key and value (keys, batch, kdim and vdim), batch before the length
    with batch_first, or none of them with a batch.

    Raises:
        TypeError, ValueError: a dropout that is no number in [0, 1), and torch.nn's own.
    """

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None,
        vdim=None, batch_first=False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        if not 0 <= _check.number("MultiheadAttention", "dropout", dropout) < 1:
            raise ValueError(f"MultiheadAttention: dropout is {dropout}; it must be at least 0 and less than 1.")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(out, weights): out has query's shape; weights are None unless need_weights.

        Args:
            key_padding_mask: (batch, keys), or (keys,) without a batch. bool: True is masked out (in
                `bigmodel.attention` it is the opposite); a float mask is added to the scores.
            need_weights: return the weights, (batch, queries, keys), or (batch, heads, queries, keys) if not averaged;
                without it torch's scaled_dot_product_attention may serve.
            attn_mask: (queries, keys) or (batch * heads, queries, keys), otherwise as key_padding_mask.
            average_attn_weights: over the heads.
            is_causal: a hint that attn_mask, which must be given, is the causal mask.

        Raises:
            TypeError: a nested tensor, a mask that is neither bool nor float, or a flag that is no bool.
            ValueError: a shape that does not fit, or is_causal without attn_mask.
        """
        op = "MultiheadAttention"
        _check.flag(op, "need_weights", need_weights)
        _check.flag(op, "average_attn_weights", average_attn_weights)
        _check.flag(op, "is_causal", is_causal)
        _check_shapes(self, query, key, value)
        batched = query.dim() == 3
        projected = self._project(query, key, value)
        if not batched:
            projected = [tensor.unsqueeze(0) for tensor in projected]
        batch_first = self.batch_first or not batched
        q, k, v = (self._split(tensor, batch_first) for tensor in projected)
        sizes = q.shape[0], self.num_heads, q.shape[2], k.shape[2]
        k, v = self._append(k, v)
        causal = _causal(attn_mask, is_causal, sizes, k.shape[2], q)
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, [(sizes[0], sizes[3]) if batched else (sizes[3],)], q)
        mask = _merge(None if causal else attn_mask, key_padding_mask, sizes, q.dtype, k.shape[2] - sizes[3])
        dropout_p = self.dropout if self.training else 0.0
        result = attention(q, k, v, mask, dropout_p, causal, return_weights=need_weights)
        out, weights = result if need_weights else (result, None)
        out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, each (..., embed_dim), by as few products as the inputs that are one allow."""
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        packed = self._qkv_same_embed_dim
        if packed and query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        if packed and key is value:
            both = None if self.in_proj_bias is None else self.in_proj_bias[self.embed_dim :]
            keys_values = F.linear(key, self.in_proj_weight[self.embed_dim :], both).chunk(2, -1)
            return [F.linear(query, self.in_proj_weight[: self.embed_dim], biases[0]), *keys_values]
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = self.in_proj_weight.chunk(3) if packed else separate
        inputs = (query, key, value)
        return [F.linear(input, weight, bias) for input, weight, bias in zip(inputs, weights, biases, strict=True)]

    def _split(self, tensor: Tensor, batch_first: bool) -> Tensor:
        """(batch, heads, length, head_dim)."""
        tensor = tensor.unflatten(-1, (self.num_heads, self.head_dim))
        return tensor.permute(0, 2, 1, 3) if batch_first else tensor.permute(1, 2, 0, 3)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With the learned key and value of add_bias_kv and the zeros of add_zero_attn, which no mask reaches."""
        keys, values = [k], [v]
        shape = k.shape[0], self.num_heads, 1, self.head_dim
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(1, self.num_heads, 1, self.head_dim).expand(shape).to(k.dtype))
            values.append(self.bias_v.view(1, self.num_heads, 1, self.head_dim).expand(shape).to(v.dtype))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        return (k, v) if len(keys) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


# --- MultiheadAttention's checks and masks ----------------------------------------------------------------------------


def _check_shapes(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    op = "MultiheadAttention"
    sizes = (module.embed_dim, module.kdim, module.vdim)
    for name, tensor, size in zip(("query", "key", "value"), (query, key, value), sizes, strict=True):
        _check.tensor(op, name, tensor)
        if tensor.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.shape[-1] != size:
            lead = "(length" if query.dim() == 2 else "(batch, length" if module.batch_first else "(length, batch"
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; accepted is {lead}, {size}).")
    length = 1 if query.dim() == 3 and module.batch_first else 0
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{op}: value has shape {tuple(value.shape)}, but key has {tuple(key.shape)}; only the last may differ."
        )
    if query.dim() == 3 and query.shape[1 - length] != key.shape[1 - length]:
        raise ValueError(
            f"{op}: key has a batch of {key.shape[1 - length]}, but query one of {query.shape[1 - length]}."
        )


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]], query: Tensor) -> None:
    op = "MultiheadAttention"
    if not isinstance(mask, Tensor) or (mask.dtype is not torch.bool and mask.dtype not in _check.DTYPE_CODES):
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{op}: {name} is {what}; accepted are tensors of bool (True is masked out) and, to be added, "
            f"{_check.SUPPORTED}."
        )
    _check.no_wider(op, name, mask, query)
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{op}: {name} has shape {tuple(mask.shape)}; accepted is {' or '.join(map(str, shapes))}.")


def _causal(attn_mask: Tensor | None, is_causal: bool, sizes: tuple[int, ...], keys: int, query: Tensor) -> bool:
    """Whether the hint may stand for the mask: not with keys that every query sees, nor where it could mean two."""
    batch, heads, queries, given = sizes
    if attn_mask is None:
        if is_causal:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, which is None.")
        return False
    _check_mask("attn_mask", attn_mask, [(queries, given), (batch * heads, queries, given)], query)
    return is_causal and queries == given == keys


def _merge(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, appended: int
) -> Tensor | None:  # fmt: skip
    """One mask for `attention`: bool where both are, True taking part, else to be added."""
    batch, heads, queries, keys = sizes
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, heads, queries, keys))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, keys))
    if not masks:
        return None
    if all(mask.dtype is torch.bool for mask in masks):
        mask = ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        return F.pad(mask, (0, appended), value=True) if appended else mask
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype is torch.bool else mask
        for mask in masks
    ]
    total = added[0] if len(added) == 1 else added[0] + added[1]
    return F.pad(total, (0, appended)) if appended else total
