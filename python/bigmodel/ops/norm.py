"""Layer and root-mean-square normalisation, alone or after the residual addition. Formulas: csrc/ops/norm.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel._native import compute_dtype
from bigmodel.ops import _norm_body, _norm_checks, _norm_reference, _norm_sharding
from bigmodel.ops._norm_checks import plain

_NAMES = {False: "rms_norm", True: "layer_norm"}  # by whether the mean is taken away
# What eps=None stands for; stock took the input dtype's own up to torch 2.6 (docs/numerics.md).
_DEFAULT_EPS = {
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float32).eps,
    torch.float64: torch.finfo(torch.float64).eps,
}

# --- the short way: one autograd.Function around the bodies -----------------------------------------------------------


class _PlainNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, centred, eps):
        rows = input.numel() // input.size(-1)
        statistics = input.new_empty(2 * rows if centred else rows, dtype=compute_dtype(input.dtype))
        ctx.save_for_backward(input, statistics, weight, bias)
        ctx.options = centred, eps, None if weight is None else weight.dtype
        return _norm_body.plain_forward(centred, statistics, input, weight, bias, eps)

    @staticmethod
    def backward(ctx, grad_out):
        _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        centred, eps, kind = ctx.options
        saved = ctx.saved_tensors
        native = _native_backward(grad_out, None, *saved)
        if not native or not _norm_checks.plain_kept(grad_out, *saved, centred, kind):
            dtype = grad_out.dtype
            _norm_checks.check_kept(_NAMES[centred], grad_out, *saved, 1, centred, dtype, dtype, kind)
        if native:
            if _all_contiguous(saved):
                return *_norm_body.plain_backward(centred, grad_out, *saved, wants_weight, wants_bias), None, None
            grad_x, _, grad_weight, grad_bias = _norm_body.backward(
                centred, grad_out, None, *saved, 1, 0.0, False, grad_out.dtype, None, wants_weight, wants_bias
            )
        else:
            input, _, weight, bias = saved
            grad_x, grad_weight, grad_bias = _norm_reference.backward(
                centred, grad_out, None, input, weight, 1, eps, 0.0, wants_weight, wants_bias
            )
            grad_x = grad_x.to(input.dtype)
            grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None


class _Options(NamedTuple):
    """What backward has to know of a call beside its tensors; `kind` is the dtype of weight and bias."""

    centred: bool
    memory_efficient: bool
    dims: int
    eps: float
    weight_offset: float
    out_dtype: torch.dtype
    x_dtype: torch.dtype
    kind: torch.dtype | None
    input_dtype: torch.dtype
    residual_dtype: torch.dtype | None


def _save(ctx, centred, memory_efficient, tensors, arguments, out, summed, statistics):
    """What backward needs of a call with these tensors and arguments, which gave the last three."""
    input, residual, weight, bias = tensors
    saved = out if memory_efficient else input if residual is None else summed
    ctx.save_for_backward(saved, statistics, weight, bias)
    affine = bias if weight is None else weight
    ctx.options = _Options(
        centred, memory_efficient, *arguments, None if affine is None else affine.dtype, input.dtype,
        None if residual is None else residual.dtype,
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, centred, memory_efficient, arguments):
        tensors = (input, residual, weight, bias)
        out, summed, statistics = _norm_body.forward(centred, *tensors, *arguments)
        _save(ctx, centred, memory_efficient, tensors, arguments, out, summed, statistics)
        if residual is None:
            return out
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(summed)
        return out, summed

    @staticmethod
    def backward(ctx, grad_out, grad_summed=None):
        saved = () if grad_out is None else ctx.saved_tensors  # the sum alone needs none, whatever has freed them
        native = _norm_body.backward if saved and _native_backward(grad_out, grad_summed, *saved) else None
        return *_backward_of(ctx, saved, native, grad_out, grad_summed), None, None, None


def _native_backward(*tensors: Tensor | None) -> bool:
    """Whether the native backward may run: no second derivative is wanted, and hooks and vmap left plain tensors.

    The two gradients come first.
    """
    return not torch.is_grad_enabled() and _registry.direct(tensors) and not any(map(_registry.batched, tensors[:2]))


def _all_contiguous(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110, a generator for all() takes twice the time
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True


def _backward_of(ctx, tensors, native, grad_out, grad_summed):
    """(grad of input, residual, weight, bias); `native` is None where only torch's own ops will do."""
    wants_input, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    centred, memory_efficient, dims, eps, weight_offset, out_dtype, x_dtype, kind, *dtypes = ctx.options
    grad_x = grad_cast = grad_weight = grad_bias = None
    if grad_out is None:
        grad_x = grad_summed
    else:
        saved, statistics, weight, bias = tensors
        saved_dtype = out_dtype if memory_efficient else x_dtype
        _norm_checks.check_kept(_NAMES[centred], grad_out, *tensors, dims, centred, saved_dtype, x_dtype, kind)
        if native is not None:
            cast_dtype = _cast_dtype(x_dtype, *dtypes)
            grad_x, grad_cast, grad_weight, grad_bias = native(
                centred, grad_out, grad_summed, *tensors, dims, weight_offset, memory_efficient, x_dtype, cast_dtype,
                wants_weight, wants_bias,
            )  # fmt: skip
            grad_cast = grad_cast if cast_dtype is not None else None
        elif memory_efficient:
            raise RuntimeError(
                "bigmodel: memory_efficient=True has neither second derivatives nor batched gradients; "
                "call with memory_efficient=False."
            )
        else:
            grad_x, grad_weight, grad_bias = _norm_reference.backward(
                centred, grad_out, grad_summed, saved, weight, dims, eps, weight_offset, wants_weight, wants_bias
            )
            grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
    input_dtype, residual_dtype = dtypes
    return (
        _in_dtype(grad_x, grad_cast, input_dtype) if wants_input else None,
        _in_dtype(grad_x, grad_cast, residual_dtype) if wants_residual else None,
        grad_weight if wants_weight else None,
        grad_bias if wants_bias else None,
    )


def _cast_dtype(x_dtype, input_dtype, residual_dtype):
    """The second dtype that the gradient of x is wanted in, if there is one."""
    return next((dtype for dtype in (input_dtype, residual_dtype) if dtype not in (x_dtype, None)), None)


def _in_dtype(grad_x: Tensor | None, grad_cast: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad_x is None or grad_x.dtype is dtype:
        return grad_x
    return grad_cast if grad_cast is not None and grad_cast.dtype is dtype else grad_x.to(dtype)


# --- the long way: ops in torch's dispatcher --------------------------------------------------------------------------

_FORWARD_SCHEMA = (
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps, float weight_offset, "
    "bool memory_efficient, ScalarType out_dtype, ScalarType x_dtype) -> (Tensor out, Tensor summed, Tensor statistics)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_summed, Tensor saved, Tensor statistics, Tensor? weight, Tensor? bias, "
    "int dims, float weight_offset, bool from_output, ScalarType x_dtype, ScalarType? cast_dtype, "
    "bool wants_weight, bool wants_bias) -> (Tensor grad_x, Tensor grad_cast, Tensor grad_weight, Tensor grad_bias)"
)


def _register(centred: bool):
    name = _NAMES[centred]

    def forward(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype):
        op, tensors = f"{name}_forward", (input, residual, weight, bias)
        _norm_checks.check_forward(op, *tensors, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype)
        results = _norm_body.forward(centred, *tensors, dims, eps, weight_offset, out_dtype, x_dtype)
        return _registry.present(results, input)

    def forward_fake(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype):
        out = torch.empty(input.shape, dtype=out_dtype, device=input.device)
        summed = None if residual is None else torch.empty(input.shape, dtype=x_dtype, device=input.device)
        return _registry.present((out, summed, _norm_body.empty_statistics(input, centred, dims, x_dtype)), input)

    def backward(grad_out, *arguments):
        _norm_checks.check_backward(f"{name}_backward", centred, grad_out, *arguments)
        return _registry.present(_norm_body.backward(centred, grad_out, *arguments), grad_out)

    def backward_fake(
        grad_out, grad_summed, saved, statistics, weight, bias, dims, weight_offset, from_output, x_dtype, cast_dtype,
        wants_weight, wants_bias,
    ):  # fmt: skip
        grad_x = torch.empty(grad_out.shape, dtype=x_dtype, device=grad_out.device)
        grad_cast = None if cast_dtype is None else torch.empty_like(grad_x, dtype=cast_dtype)
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if wants_bias else None
        return _registry.present((grad_x, grad_cast, grad_weight, grad_bias), grad_out)

    def setup_context(ctx, inputs, output):
        *tensors, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype = inputs
        _save(ctx, centred, memory_efficient, tensors, (dims, eps, weight_offset, out_dtype, x_dtype), *output)

    def autograd_backward(ctx, grad_out, grad_summed, _grad_statistics):
        grad_summed = grad_summed if ctx.options.residual_dtype is not None else None
        native = None if torch.is_grad_enabled() else call_backward
        grads = _backward_of(ctx, ctx.saved_tensors, native, grad_out, grad_summed)
        return *grads, None, None, None, None, None, None

    def call_backward(_centred, *arguments):
        return backward_op(*arguments)

    backward_op = _registry.register(
        f"{name}_backward", _BACKWARD_SCHEMA, backward, backward_fake, sharding=_norm_sharding.backward
    )
    return _registry.register(
        f"{name}_forward", _FORWARD_SCHEMA, forward, forward_fake, autograd_backward, setup_context,
        sharding=_norm_sharding.forward,
    )  # fmt: skip


_FORWARD_OPS = {centred: _register(centred) for centred in _NAMES}

# --- public functions -------------------------------------------------------------------------------------------------


def _norm(
    op, centred, input, residual, normalized_shape, weight, bias, eps,
    weight_offset, memory_efficient, out_dtype, residual_dtype=None,
):  # fmt: skip
    shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple) else _check.shape(op, normalized_shape)
    _check.tensor(op, "input", input)
    x_dtype = input.dtype
    if residual is not None:
        _check.tensor(op, "residual", residual)
        x_dtype = torch.promote_types(x_dtype, residual.dtype) if residual_dtype is None else residual_dtype
        _check.dtype(op, "residual_dtype", x_dtype)
    if eps is None and not centred:
        eps = _DEFAULT_EPS[x_dtype]
    if out_dtype is None:
        out_dtype = _registry.autocast_dtype(input)
    tensors = (input, residual, weight, bias)
    direct = _registry.direct(tensors)
    if direct and plain(input, residual, shape, weight, bias, eps, weight_offset, memory_efficient, out_dtype):
        if torch.is_grad_enabled() and _registry.requires_grad(tensors):
            return _PlainNorm.apply(input, weight, bias, centred, eps), None
        return _norm_body.plain_forward(centred, None, input, weight, bias, eps), None
    _norm_checks.check_arguments(op, *tensors, shape, eps, weight_offset, memory_efficient, out_dtype, x_dtype)
    arguments = (len(shape), float(eps), float(weight_offset), out_dtype, x_dtype)
    if not direct:
        if _registry.transforming():
            summed = None if residual is None else _norm_reference.wide_sum(input, residual).to(x_dtype)
            x = input if residual is None else summed
            return _norm_reference.forward(centred, x, weight, bias, len(shape), eps, weight_offset, out_dtype), summed
        return _registry.dispatch(_FORWARD_OPS[centred], *tensors, *arguments[:3], memory_efficient, *arguments[3:])[:2]
    if torch.is_grad_enabled() and _registry.requires_grad(tensors):
        results = _Norm.apply(*tensors, centred, memory_efficient, arguments)
        return (results, None) if residual is None else results
    return _norm_body.forward_into(None, centred, *tensors, *arguments)


def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, weight_offset: float = 0.0, memory_efficient: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """(input - mean) / sqrt(var + eps) * (weight + weight_offset) + bias over the last dimensions.

    The signature and defaults of torch.nn.functional.layer_norm come first. mean and var (biased) are taken over the
    last len(normalized_shape) dimensions, in float32, or float64 for a float64 input (Ba, Kiros, Hinton, arXiv
    1607.06450).

    Args:
        input: (*, *normalized_shape), float32, bfloat16, float16 or float64, on a CPU or CUDA device. Any strides: rows
            that lie contiguous at one distance are read in place, others are copied.
        normalized_shape: the sizes of the dimensions to normalise over.
        weight, bias: normalized_shape, one dtype of the four (float64 only with a float64 input); None for ones, zeros.
        eps: added to the variance; finite, not negative.
        weight_offset: added to weight in float32: 1.0 for weights stored around zero.
        memory_efficient: keep the output for backward instead of the input, where a following matrix product keeps the
            output anyway. Where weight + weight_offset is 0 the input cannot be recovered and is taken as the mean;
            elsewhere the output's rounding enters the gradient divided by the weight (docs/numerics.md).
        out_dtype: the result's dtype; None for the input's (float32 under CUDA autocast, as in torch).

    Returns:
        A contiguous tensor of input's shape.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a shape, device or number that does not fit.
    """
    return _norm(
        "layer_norm", True, input, None, normalized_shape, weight, bias, eps, weight_offset, memory_efficient, out_dtype
    )[0]


def rms_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, eps: float | None = None,
    *, weight_offset: float = 0.0, memory_efficient: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """input / sqrt(mean(input^2) + eps) * (weight + weight_offset) over the last dimensions.

    The signature and defaults of torch.nn.functional.rms_norm come first (Zhang, Sennrich, arXiv 1910.07467).

    Args:
        eps: None for torch.finfo(torch.float32).eps with float32, bfloat16 and float16 inputs, and
            torch.finfo(torch.float64).eps with float64.

    Everything else is as in `layer_norm`.
    """
    return _norm(
        "rms_norm", False, input, None, normalized_shape, weight, None, eps, weight_offset, memory_efficient, out_dtype
    )[0]


def add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *, weight_offset: float = 0.0, memory_efficient: bool = False,
    out_dtype: torch.dtype | None = None, residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layer_norm` of input + residual, and the sum: (normed, summed), the step of a pre-norm residual stream.

    Args:
        residual: input's shape, any supported dtype.
        residual_dtype: the dtype of `summed`, to which the sum is rounded before it is normalised; None for
            torch.promote_types(input.dtype, residual.dtype). torch.float32 keeps the stream in float32 whatever the
            blocks compute in.

    Everything else is as in `layer_norm`; normed has input's dtype unless out_dtype says otherwise.
    """
    _check.tensor("add_layer_norm", "residual", residual)
    return _norm(
        "add_layer_norm", True, input, residual, normalized_shape, weight, bias, eps,
        weight_offset, memory_efficient, out_dtype, residual_dtype,
    )  # fmt: skip


def add_rms_norm(
    input: Tensor, residual: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, *, weight_offset: float = 0.0, memory_efficient: bool = False,
    out_dtype: torch.dtype | None = None, residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rms_norm` of input + residual, and the sum: (normed, summed). Arguments as in `add_layer_norm`, `rms_norm`."""
    _check.tensor("add_rms_norm", "residual", residual)
    return _norm(
        "add_rms_norm", False, input, residual, normalized_shape, weight, None, eps,
        weight_offset, memory_efficient, out_dtype, residual_dtype,
    )  # fmt: skip
