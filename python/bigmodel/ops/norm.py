"""Layer and root-mean-square normalisation, alone or after the residual addition. Formulas: csrc/ops/norm.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _norm_body, _norm_reference

_float32 = torch.float32
# What eps=None stands for; stock took the input dtype's own up to torch 2.6 (docs/numerics.md).
_DEFAULT_EPS = {
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float32).eps,
    torch.float64: torch.finfo(torch.float64).eps,
}

# --- checks -----------------------------------------------------------------------------------------------------------


def _plain(input, residual, shape, weight, bias, eps, weight_offset, memory_efficient, out_dtype):
    """A quick yes to nearly every call, which needs no option and no copy, and whose price on small rows is Python's.

    Naming what is wrong, and the rarer right, is _check_arguments' part.
    """
    dtype, index = input.dtype, input.get_device()
    return (
        residual is None
        and len(shape) == 1
        and input.dim() > 0
        and input.shape[-1] == shape[0] > 0
        and input.is_contiguous()
        and (
            weight is None
            or weight.shape == shape
            and weight.is_contiguous()
            and weight.get_device() == index
            and ((kind := weight.dtype) is dtype or kind is _float32)
            and (
                bias is None
                or bias.shape == shape
                and bias.is_contiguous()
                and bias.get_device() == index
                and bias.dtype is kind
            )
        )
        and (bias is None or weight is not None)
        and type(eps) is float
        and 0.0 <= eps < math.inf
        and weight_offset == 0.0
        and not memory_efficient
        and out_dtype is dtype
    )


def _check_arguments(op, input, residual, shape, weight, bias, eps, weight_offset, out_dtype, x_dtype):
    dims = len(shape)
    if not dims or input.dim() < dims or tuple(input.shape[input.dim() - dims :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape {shape} does not match the end of input's shape {tuple(input.shape)}."
        )
    if residual is not None:
        _check.like(op, "residual", residual, input.shape, "input", input.device)
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.like(op, argument, value, shape, "normalized_shape", input.device)
            if value.dtype is torch.float64 and x_dtype is not torch.float64:
                raise TypeError(
                    f"{op}: {argument} is float64, but {x_dtype} is normalised; pass it in {x_dtype} or float32."
                )
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"{op}: bias has dtype {bias.dtype}, but weight has {weight.dtype}; they must be the same.")
    _check.number(op, "eps", eps, minimum=0)
    _check.number(op, "weight_offset", weight_offset)
    if weight is None and weight_offset:
        raise ValueError(f"{op}: weight_offset is {weight_offset}, but there is no weight to add it to.")
    _check.dtype(op, "out_dtype", out_dtype)


# --- the short way: one autograd.Function around the bodies -----------------------------------------------------------


class _PlainNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, centred, eps):
        rows = input.numel() // input.size(-1)
        statistics = input.new_empty(2 * rows if centred else rows, dtype=_norm_body.statistics_dtype(input.dtype))
        ctx.save_for_backward(input, statistics, weight, bias)
        ctx.centred, ctx.eps = centred, eps
        return _norm_body.plain_forward(centred, statistics, input, weight, bias, eps)

    @staticmethod
    def backward(ctx, grad_out):
        _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        saved = ctx.saved_tensors
        if _native_backward(grad_out, None, *saved):
            if _all_contiguous(saved):
                return *_norm_body.plain_backward(ctx.centred, grad_out, *saved, wants_weight, wants_bias), None, None
            grad_x, _, grad_weight, grad_bias = _norm_body.backward(
                ctx.centred, grad_out, None, *saved, 1, 0.0, False, grad_out.dtype, None, wants_weight, wants_bias
            )
        else:
            input, _, weight, bias = saved
            grad_x, grad_weight, grad_bias = _norm_reference.backward(
                ctx.centred, grad_out, None, input, weight, 1, ctx.eps, 0.0, wants_weight, wants_bias
            )
            grad_x = grad_x.to(input.dtype)
            grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, centred, arguments):
        out, summed, statistics = _norm_body.forward(centred, input, residual, weight, bias, *arguments)
        ctx.save_for_backward(out if arguments[3] else input if residual is None else summed, statistics, weight, bias)
        ctx.centred, ctx.arguments = centred, arguments
        if residual is None:
            ctx.dtypes = (input.dtype, None)
            return out
        ctx.dtypes = (input.dtype, residual.dtype)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(summed)
        return out, summed

    @staticmethod
    def backward(ctx, grad_out, grad_summed=None):
        saved = () if grad_out is None else ctx.saved_tensors  # the sum alone needs none, whatever has freed them
        native = _norm_body.backward if saved and _native_backward(grad_out, grad_summed, *saved) else None
        return *_backward_of(ctx, saved, native, grad_out, grad_summed), None, None


def _native_backward(*tensors: Tensor | None) -> bool:
    """Whether the native backward may run: no second derivative is wanted, and hooks and vmap left plain tensors.

    The two gradients come first.
    """
    if torch.is_grad_enabled() or not _registry.direct(tensors) or any(map(_registry.batched, tensors[:2])):
        return False
    index = None
    for tensor in tensors:
        if tensor is not None:
            if index is None:
                index = tensor.get_device()
            elif tensor.get_device() != index:
                return False
    return True


def _all_contiguous(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110, a generator for all() takes twice the time
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True


def _backward_of(ctx, tensors, native, grad_out, grad_summed):
    """(grad of input, residual, weight, bias); `native` is None where only torch's own ops will do."""
    wants_input, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    dims, eps, weight_offset, memory_efficient, _, x_dtype = ctx.arguments
    input_dtype, residual_dtype = ctx.dtypes
    grad_x = grad_cast = grad_weight = grad_bias = None
    if grad_out is None:
        grad_x = grad_summed
    elif native is not None:
        saved, statistics, weight, bias = tensors
        cast_dtype = _cast_dtype(x_dtype, input_dtype, residual_dtype)
        grad_x, grad_cast, grad_weight, grad_bias = native(
            ctx.centred, grad_out, grad_summed, saved, statistics, weight, bias, dims, weight_offset, memory_efficient,
            x_dtype, cast_dtype, wants_weight, wants_bias,
        )  # fmt: skip
        grad_cast = grad_cast if cast_dtype is not None else None
    elif memory_efficient:
        raise RuntimeError(
            "bigmodel: memory_efficient=True has neither second derivatives nor batched gradients; "
            "call with memory_efficient=False."
        )
    else:
        saved, _, weight, bias = tensors
        grad_x, grad_weight, grad_bias = _norm_reference.backward(
            ctx.centred, grad_out, grad_summed, saved, weight, dims, eps, weight_offset, wants_weight, wants_bias
        )
        grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
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


def _present(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A schema has no optional results: an empty tensor stands for one that does not exist."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _row_placements(spec, dims: int):
    """The ways to place rows on a mesh dimension, of x and of statistics: normalised dimensions are replicated."""
    from torch.distributed.tensor import Replicate, Shard

    rows = len(spec.tensor_meta.shape) - dims
    return [(Replicate(), Replicate()), *((Shard(i), Shard(i + 1)) for i in range(rows))]


def _forward_sharding(input, residual, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    return [
        (
            [x, whole if residual is None else x, statistics],
            [x, None if residual is None else x, None if weight is None else whole, None if bias is None else whole,
             None, *(None for _ in scalars)],
        )
        for x, statistics in _row_placements(input, dims)
    ]  # fmt: skip


def _backward_sharding(grad_out, grad_summed, saved, statistics, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Partial, Replicate

    whole = Replicate()
    *_, cast_dtype, wants_weight, wants_bias = scalars
    strategies = []
    for x, rows in _row_placements(grad_out, dims):
        summed = whole if x == whole else Partial()
        strategies.append((
            [x, whole if cast_dtype is None else x, summed if wants_weight else whole, summed if wants_bias else whole],
            [x, None if grad_summed is None else x, x, rows, None if weight is None else whole,
             None if bias is None else whole, None, *(None for _ in scalars)],
        ))  # fmt: skip
    return strategies


def _register(name: str, centred: bool):
    op = f"{name}_forward"

    def forward(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype):
        shape = tuple(input.shape[input.dim() - dims :])
        _check_arguments(op, input, residual, shape, weight, bias, eps, weight_offset, out_dtype, x_dtype)
        arguments = (residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype)
        return _present(_norm_body.forward(centred, input, *arguments), input)

    def forward_fake(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, x_dtype):
        out = torch.empty(input.shape, dtype=out_dtype, device=input.device)
        summed = None if residual is None else torch.empty(input.shape, dtype=x_dtype, device=input.device)
        return _present((out, summed, _norm_body.empty_statistics(input, centred, dims, x_dtype)), input)

    def backward(grad_out, *arguments):
        return _present(_norm_body.backward(centred, grad_out, *arguments), grad_out)

    def backward_fake(
        grad_out, grad_summed, saved, statistics, weight, bias, dims, weight_offset, from_output, x_dtype, cast_dtype,
        wants_weight, wants_bias,
    ):  # fmt: skip
        grad_x = torch.empty(grad_out.shape, dtype=x_dtype, device=grad_out.device)
        grad_cast = None if cast_dtype is None else torch.empty_like(grad_x, dtype=cast_dtype)
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if wants_bias else None
        return _present((grad_x, grad_cast, grad_weight, grad_bias), grad_out)

    def setup_context(ctx, inputs, output):
        input, residual, weight, bias, *arguments = inputs
        out, summed, statistics = output
        ctx.save_for_backward(out if arguments[3] else input if residual is None else summed, statistics, weight, bias)
        ctx.centred, ctx.arguments = centred, arguments
        ctx.dtypes = (input.dtype, None if residual is None else residual.dtype)

    def autograd_backward(ctx, grad_out, grad_summed, _grad_statistics):
        grad_summed = grad_summed if ctx.dtypes[1] is not None else None
        native = None if torch.is_grad_enabled() else call_backward
        grads = _backward_of(ctx, ctx.saved_tensors, native, grad_out, grad_summed)
        return *grads, None, None, None, None, None, None

    def call_backward(_centred, *arguments):
        return backward_op(*arguments)

    backward_op = _registry.register(
        f"{name}_backward", _BACKWARD_SCHEMA, backward, backward_fake, sharding=_backward_sharding
    )
    return _registry.register(
        op, _FORWARD_SCHEMA, forward, forward_fake, autograd_backward, setup_context,
        sharding=_forward_sharding,
    )  # fmt: skip


_FORWARD_OPS = {False: _register("rms_norm", False), True: _register("layer_norm", True)}

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
    if direct and _plain(input, residual, shape, weight, bias, eps, weight_offset, memory_efficient, out_dtype):
        if torch.is_grad_enabled() and _registry.requires_grad(tensors):
            return _PlainNorm.apply(input, weight, bias, centred, eps), None
        return _norm_body.plain_forward(centred, None, input, weight, bias, eps), None
    _check_arguments(op, input, residual, shape, weight, bias, eps, weight_offset, out_dtype, x_dtype)
    arguments = (len(shape), float(eps), float(weight_offset), memory_efficient, out_dtype, x_dtype)
    if not direct:
        if _registry.transforming():
            summed = None if residual is None else _norm_reference.wide_sum(input, residual).to(x_dtype)
            x = input if residual is None else summed
            return _norm_reference.forward(centred, x, weight, bias, len(shape), eps, weight_offset, out_dtype), summed
        return _registry.dispatch(_FORWARD_OPS[centred], *tensors, *arguments)[:2]
    if torch.is_grad_enabled() and _registry.requires_grad(tensors):
        results = _Norm.apply(*tensors, centred, arguments)
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
