"""Softmax, alone or with all that lies between the two products of attention. Formulas: csrc/ops/softmax.h."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel._native import compute_dtype
from bigmodel.ops import _softmax_body, _softmax_checks, _softmax_columns, _softmax_reference, _softmax_sharding
from bigmodel.ops._softmax_reference import Options

# --- the short way: one autograd.Function around the bodies -----------------------------------------------------------


class _AttentionSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, mask, slopes, sinks, seed, options, out_dtype, inplace):
        kept = None if options.softcap is None else scores.clone() if inplace else scores
        out, probs, sink_probs = _softmax_body.forward(scores, mask, slopes, sinks, seed, options, out_dtype, inplace)
        ctx.save_for_backward(out if probs is None else probs, kept, sink_probs, seed)
        ctx.options, ctx.scores_dtype, ctx.copied = options, scores.dtype, kept is not None and inplace
        ctx.mask = (mask.shape, mask.dtype) if ctx.needs_input_grad[1] else (None, None)
        ctx.sinks_dtype = sinks.dtype if ctx.needs_input_grad[3] else None
        if inplace:
            ctx.mark_dirty(scores)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        native = _softmax_body.backward if _softmax_body.native_backward(grad_out, *saved) else None
        grad_scores, grad_mask, grad_sinks = _backward_of(ctx, saved, native, grad_out)
        return grad_scores, grad_mask, None, grad_sinks, None, None, None, None


def _backward_of(ctx, tensors, native, grad_out):
    """(grad of scores, mask, sinks); `native` is None where only torch's own ops will do."""
    y, scores, sink_probs, seed = tensors
    _softmax_checks.check_kept("attention_softmax", grad_out, y, scores, sink_probs, seed, ctx.scores_dtype)
    mask_shape, mask_dtype = ctx.mask
    wants_sinks = ctx.sinks_dtype is not None
    if native is not None:
        grad_scores, grad_mask, grad_sinks = native(
            grad_out, y, scores, sink_probs, seed, ctx.options, ctx.scores_dtype, mask_shape, wants_sinks
        )
    else:
        if torch.is_grad_enabled() and (seed is not None or ctx.copied):
            reason = "dropout_p > 0" if seed is not None else "softcap and inplace=True"
            raise RuntimeError(f"attention_softmax: there are no second derivatives with {reason}.")
        grad_scores, grad_mask, grad_sinks = _softmax_reference.backward(
            grad_out, y, scores, seed, ctx.options, ctx.scores_dtype, mask_shape, wants_sinks
        )
    return (
        grad_scores,
        None if grad_mask is None else grad_mask.to(mask_dtype),
        None if grad_sinks is None else grad_sinks.to(ctx.sinks_dtype),
    )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, log, out_dtype):
        out = _softmax_body.plain_forward(input, log, out_dtype)
        ctx.save_for_backward(out)
        ctx.options = (log, input.dtype)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        (out,) = ctx.saved_tensors
        _softmax_checks.check_kept_out(grad_out, out)
        body = _softmax_body if _softmax_body.native_backward(grad_out, out) else _softmax_reference
        return body.plain_backward(grad_out, out, *ctx.options), None, None


_apply_attention_softmax = _registry.applier(_AttentionSoftmax)
_apply_softmax = _registry.applier(_Softmax)

# --- the long way: ops in torch's dispatcher --------------------------------------------------------------------------

_OPTIONS = "float scale, SymInt? left, SymInt? right, float? softcap, float dropout_p"
_FORWARD_SCHEMA = (
    f"(Tensor scores, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, {_OPTIONS}, "
    "ScalarType out_dtype) -> (Tensor out, Tensor probs, Tensor sink_probs)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor saved, Tensor? scores, Tensor? sink_probs, Tensor? seed, {_OPTIONS}, "
    "ScalarType scores_dtype, SymInt[]? mask_shape, bool wants_sinks) "
    "-> (Tensor grad_scores, Tensor grad_mask, Tensor grad_sinks)"
)


def _register_attention():
    def forward(scores, mask, alibi_slopes, sinks, seed, scale, left, right, softcap, dropout_p, out_dtype):
        op = "attention_softmax_forward"
        _softmax_checks.check_scores(op, scores, False, out_dtype)
        _softmax_checks.check_seed(op, seed, dropout_p, scores)
        with torch.no_grad():
            window = (left, right)
            options = _softmax_checks.check_options(
                op, scores, scale, mask, False, window, alibi_slopes, softcap, sinks, dropout_p
            )
        results = _softmax_body.forward(scores, mask, alibi_slopes, sinks, seed, options, out_dtype)
        return _registry.present(results, scores)

    def forward_fake(scores, mask, alibi_slopes, sinks, seed, scale, left, right, softcap, dropout_p, out_dtype):
        out = torch.empty(scores.shape, dtype=out_dtype, device=scores.device)
        sink_dtype = compute_dtype(scores.dtype)
        sink_probs = None if sinks is None else scores.new_empty(scores.shape[:-1], dtype=sink_dtype)
        return _registry.present((out, None if seed is None else torch.empty_like(out), sink_probs), scores)

    def backward(grad_out, saved, scores, sink_probs, seed, *rest):
        *options, scores_dtype, mask_shape, wants_sinks = rest
        _softmax_checks.check_backward(
            "attention_softmax_backward", grad_out, saved, scores, sink_probs, seed, Options(*options), scores_dtype,
            mask_shape, wants_sinks,
        )  # fmt: skip
        grads = _softmax_body.backward(
            grad_out, saved, scores, sink_probs, seed, Options(*options), scores_dtype, mask_shape, wants_sinks
        )
        return _registry.present(grads, saved)

    def backward_fake(grad_out, saved, scores, sink_probs, seed, *rest):
        *_, scores_dtype, mask_shape, wants_sinks = rest
        compute = compute_dtype(scores_dtype)
        grad_scores = torch.empty(saved.shape, dtype=scores_dtype, device=saved.device)
        grad_mask = None if mask_shape is None else saved.new_empty(mask_shape, dtype=compute)
        grad_sinks = saved.new_empty(saved.shape[-3], dtype=compute) if wants_sinks else None
        return _registry.present((grad_scores, grad_mask, grad_sinks), saved)

    def setup_context(ctx, inputs, output):
        scores, mask, _, sinks, seed, *options, _ = inputs
        out, probs, sink_probs = output
        softcap = options[3]
        ctx.save_for_backward(
            out if seed is None else probs,
            None if softcap is None else scores,
            None if sinks is None else sink_probs,
            seed,
        )
        ctx.options, ctx.scores_dtype, ctx.copied = Options(*options), scores.dtype, False
        ctx.mask = (mask.shape, mask.dtype) if ctx.needs_input_grad[1] else (None, None)
        ctx.sinks_dtype = sinks.dtype if ctx.needs_input_grad[3] else None

    def autograd_backward(ctx, grad_out, _grad_probs, _grad_sink_probs):
        native = None if torch.is_grad_enabled() else call_backward
        grad_scores, grad_mask, grad_sinks = _backward_of(ctx, ctx.saved_tensors, native, grad_out)
        return grad_scores, grad_mask, None, grad_sinks, *(None for _ in range(7))

    def call_backward(grad_out, y, scores, sink_probs, seed, options, scores_dtype, mask_shape, wants_sinks):
        results = backward_op(grad_out, y, scores, sink_probs, seed, *options, scores_dtype, mask_shape, wants_sinks)
        return results[0], None if mask_shape is None else results[1], results[2] if wants_sinks else None

    backward_op = _registry.register(
        "attention_softmax_backward", _BACKWARD_SCHEMA, backward, backward_fake,
        sharding=_softmax_sharding.attention_backward,
    )  # fmt: skip
    return _registry.register(
        "attention_softmax_forward", _FORWARD_SCHEMA, forward, forward_fake, autograd_backward, setup_context,
        sharding=_softmax_sharding.attention_forward,
    )  # fmt: skip


def _register_softmax():
    def forward_fake(input, log, out_dtype):
        return torch.empty(input.shape, dtype=out_dtype, device=input.device)

    def forward(input, log, out_dtype):
        _check.tensor("softmax_forward", "input", input)
        _check.dtype("softmax_forward", "out_dtype", out_dtype)
        if not input.dim():
            raise ValueError("softmax_forward: input has no dimension; there must be one to sum over.")
        return _softmax_body.plain_forward(input, log, out_dtype)

    def backward(grad_out, out, log, input_dtype):
        _check.dtype("softmax_backward", "input_dtype", input_dtype)
        _softmax_checks.check_out("softmax_backward", grad_out, out, "out")
        return _softmax_body.plain_backward(grad_out, out, log, input_dtype)

    def backward_fake(grad_out, out, log, input_dtype):
        return torch.empty(out.shape, dtype=input_dtype, device=out.device)

    def setup_context(ctx, inputs, output):
        input, ctx.log, _ = inputs
        ctx.dtype = input.dtype
        ctx.save_for_backward(output)

    def autograd_backward(ctx, grad_out):
        (out,) = ctx.saved_tensors
        _softmax_checks.check_kept_out(grad_out, out)
        body = _softmax_reference.plain_backward if torch.is_grad_enabled() else backward_op
        return body(grad_out, out, ctx.log, ctx.dtype), None, None

    backward_op = _registry.register(
        "softmax_backward", "(Tensor grad_out, Tensor out, bool log, ScalarType input_dtype) -> Tensor",
        backward, backward_fake, sharding=_softmax_sharding.softmax_backward,
    )  # fmt: skip
    return _registry.register(
        "softmax_forward", "(Tensor input, bool log, ScalarType out_dtype) -> Tensor",
        forward, forward_fake, autograd_backward, setup_context, sharding=_softmax_sharding.softmax_forward,
    )  # fmt: skip


_ATTENTION_FORWARD = _register_attention()
_SOFTMAX_FORWARD = _register_softmax()

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
            dtypes, added in the arithmetic's dtype, and float64 with float64 scores only, since it would be rounded;
            it may require grad.
        causal: a query sees no key after p. With queries != keys this is aligned at the bottom right, as in
            FlashAttention and for decoding with a cache; torch's is_causal is aligned at the top left.
        window: (left, right): a query sees the keys from p - left to p + right, both included; None for no limit on a
            side. causal makes right 0.
        alibi_slopes: (heads,), a dtype as mask may have, without gradient (Press, Smith, Lewis, arXiv 2108.12409).
        softcap: greater than 0; None for none (Gemma 2, arXiv 2408.00118).
        sinks: (heads,), a dtype as mask may have, a logit more in each denominator, which scale, mask and softcap
            leave alone (gpt-oss, arXiv 2508.10925); it may require grad.
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
    _softmax_checks.check_scores(op, scores, inplace, out_dtype)
    options = _softmax_checks.check_options(
        op, scores, scale, mask, causal, window, alibi_slopes, softcap, sinks, dropout_p
    )
    if out_dtype is None:
        out_dtype = scores.dtype if inplace else _registry.autocast_dtype(scores)
    tensors = (scores, mask, alibi_slopes, sinks, _seed(scores, dropout_p))
    if _registry.direct(tensors):
        if torch.is_grad_enabled() and _registry.requires_grad(tensors):
            return _apply_attention_softmax(*tensors, options, out_dtype, inplace)
        out = _softmax_body.forward(*tensors, options, out_dtype, inplace)[0]
        if inplace:
            torch.autograd.graph.increment_version(scores)
        return out
    if _registry.transforming():
        out = _softmax_reference.forward(*tensors, options, out_dtype)
    else:
        out = _registry.dispatch(_ATTENTION_FORWARD, *tensors, *options, out_dtype)[0]
    return scores.copy_(out) if inplace else out


def _seed(scores: Tensor, dropout_p: float) -> Tensor | None:
    """64 random bits from torch's generator on the scores' device, for dropout."""
    if not dropout_p:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=scores.device)


def _softmax(op: str, log: bool, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is None and dim == -1 and isinstance(input, Tensor) and _plain(input):
        return _direct(input, log, input.dtype)
    dim = _softmax_checks.check_dim(op, input, dim, dtype)
    if input.dim() == 0 or any(size != 1 for size in input.shape[dim + 1 :]):
        return _softmax_columns.softmax(input, dim, log, dtype)
    if dtype is None:
        dtype = _registry.autocast_dtype(input)
    elif dtype is not torch.float32 or input.dtype is torch.float64:  # else the kernel's own load is the conversion
        input = input.to(dtype)
    if dim == input.dim() - 1:
        return _last_dim(input, log, dtype)
    return _last_dim(input.flatten(dim), log, dtype).view(input.shape)


def _plain(input: Tensor) -> bool:
    """A quick yes to what needs no conversion and no check, whose price on small rows is Python's."""
    return (
        input.is_cpu
        and input.dim() > 0
        and input.dtype in _check.DTYPE_CODES
        and input.layout is torch.strided
        and not input.is_nested
        and _registry.direct((input,))
    )


def _direct(input: Tensor, log: bool, dtype: torch.dtype) -> Tensor:
    if input.requires_grad and torch.is_grad_enabled():
        return _apply_softmax(input, log, dtype)
    return _softmax_body.plain_forward(input, log, dtype)


def _last_dim(input: Tensor, log: bool, dtype: torch.dtype) -> Tensor:
    if _registry.direct((input,)):
        return _direct(input, log, dtype)
    if _registry.transforming():
        return _softmax_reference.plain_forward(input, log, dtype)
    return _registry.dispatch(_SOFTMAX_FORWARD, input, log, dtype)


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) along a dimension, with the arguments of torch.softmax.

    Unlike torch.nn.functional.softmax's, the third argument is dtype, and without dim the last dimension is meant
    whatever input has (there: the first one of 0, 1 and 3 dimensions, else the second).

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64, on a CPU or CUDA device.
        dim: the dimension to sum over. Unless it is the last one, or only sizes of 1 come after it, its elements lie
            apart. On a CPU a kernel for columns runs; torch's does on CUDA and where fewer than 16 columns lie side by
            side, and a CPU's last bits follow the thread count there.
        dtype: input is converted to it before anything else, and the result has it; None for input's (float32 under
            CUDA autocast, as in torch).

    Returns:
        A tensor of input's shape. As in torch, a row of -inf alone gives NaN; attention_softmax gives zeros.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a dimension that input does not have, or a device that is not supported.
    """
    return _softmax("softmax", False, input, dim, dtype)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """input - log(sum(exp(input))) along a dimension, with the arguments of torch.log_softmax.

    Everything else is as in `softmax`.
    """
    return _softmax("log_softmax", True, input, dim, dtype)
