"""Layer and root-mean-square normalisation, alone or after the residual addition. Formulas: csrc/ops/norm.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel._native import DTYPE_CODES

# What eps=None stands for; stock's rms_norm takes the input dtype's own (docs/numerics.md).
_DEFAULT_EPS = {
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float32).eps,
    torch.float64: torch.finfo(torch.float64).eps,
}

# --- checks -----------------------------------------------------------------------------------------------------------


def _check_arguments(op, input, residual, shape, weight, bias, eps, weight_offset, out_dtype, summed_dtype):
    _check.tensor(op, "input", input)
    dims = len(shape)
    if not dims or input.dim() < dims or tuple(input.shape[input.dim() - dims :]) != shape:
        raise ValueError(f"{op}: normalized_shape {shape} does not match the end of input's shape {tuple(input.shape)}.")
    if residual is not None:
        _check.like(op, "residual", residual, input.shape, "input", input.device)
        _check.dtype(op, "residual_dtype", summed_dtype)
    x_dtype = input.dtype if residual is None else summed_dtype
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.like(op, argument, value, shape, "normalized_shape", input.device)
            if value.dtype is torch.float64 and x_dtype is not torch.float64:
                raise TypeError(f"{op}: {argument} is float64, but {x_dtype} is normalised; pass it in {x_dtype} or float32.")
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"{op}: bias has dtype {bias.dtype}, but weight has {weight.dtype}; they must be the same.")
    _check.number(op, "eps", eps, minimum=0)
    _check.number(op, "weight_offset", weight_offset)
    if weight is None and weight_offset:
        raise ValueError(f"{op}: weight_offset is {weight_offset}, but there is no weight to add it to.")
    _check.dtype(op, "out_dtype", out_dtype)


# --- bodies: allocate, then one native call ---------------------------------------------------------------------------


def _as_rows(tensor: Tensor, cols: int) -> tuple[Tensor, int]:
    """The tensor, or a copy if its rows do not lie contiguous at one distance, and that distance in elements."""
    if tensor.is_contiguous():
        return tensor, cols
    try:
        matrix = tensor.view(-1, cols)
    except RuntimeError:
        return tensor.contiguous(), cols
    return (matrix, matrix.stride(0)) if matrix.stride(1) == 1 else (tensor.contiguous(), cols)


def _columns(tensor: Tensor, dims: int) -> int:
    return tensor.size(-1) if dims == 1 else math.prod(tensor.shape[tensor.dim() - dims :])


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _forward(centred, input, residual, weight, bias, dims, eps, weight_offset, out_dtype, summed_dtype, statistics=True):
    """(out, summed, mean, rstd); what does not exist, or is not wanted, is None."""
    shape, device = input.shape, input.device
    summed = None if residual is None else _registry.empty(shape, summed_dtype, device)
    out = _registry.empty(shape, out_dtype, device)
    cols = _columns(input, dims)
    row_shape = shape[: input.dim() - dims]
    mean = rstd = None
    if statistics:
        dtype = _statistics_dtype(input.dtype if residual is None else summed_dtype)
        rstd = torch.empty(row_shape, dtype=dtype, device=device)
        mean = torch.empty(row_shape, dtype=dtype, device=device) if centred else None
    if out.numel():
        input, stride = _as_rows(input, cols)
        residual, residual_stride = (None, 0) if residual is None else _as_rows(residual, cols)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        table, pointer = _registry.native(input), _registry.pointer
        (table.layer_norm_forward if centred else table.rms_norm_forward)(
            out.data_ptr(), pointer(summed), pointer(mean), pointer(rstd),
            input.data_ptr(), pointer(residual), pointer(weight), pointer(bias),
            out.numel() // cols, cols, stride, residual_stride,
            DTYPE_CODES[out_dtype],
            0 if summed is None else DTYPE_CODES[summed_dtype],
            DTYPE_CODES[input.dtype],
            0 if residual is None else DTYPE_CODES[residual.dtype],
            0 if weight is None else DTYPE_CODES[weight.dtype],
            eps, weight_offset, *_registry.place(input),
        )  # fmt: skip
    return out, summed, mean, rstd


def _backward(
    centred, grad_out, grad_summed, saved, mean, rstd, weight, bias,
    dims, weight_offset, from_output, x_dtype, cast_dtype, wants_weight, wants_bias,
):  # fmt: skip
    """(grad_x, grad_cast, grad_weight, grad_bias); what does not exist, or is not wanted, is None."""
    shape, device = grad_out.shape, grad_out.device
    cols = _columns(grad_out, dims)
    grad_x = _registry.empty(shape, x_dtype, device)
    grad_cast = None if cast_dtype is None else _registry.empty(shape, cast_dtype, device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if wants_weight else None
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=device) if wants_bias else None
    if not cols:
        return grad_x, grad_cast, grad_weight, grad_bias
    rows = grad_out.numel() // cols
    table, pointer, (index, stream) = _registry.native(grad_out), _registry.pointer, _registry.place(grad_out)
    partials = None
    if wants_weight or wants_bias:
        blocks = table.norm_backward_blocks(rows, cols, index)
        partials = torch.empty(blocks * 2 * cols, dtype=_statistics_dtype(x_dtype), device=device)
    grad_out, grad_out_stride = _as_rows(grad_out, cols)
    saved, saved_stride = _as_rows(saved, cols)
    grad_summed, grad_summed_stride = (None, 0) if grad_summed is None else _as_rows(grad_summed, cols)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (table.layer_norm_backward if centred else table.rms_norm_backward)(
        grad_x.data_ptr(), pointer(grad_cast), pointer(grad_weight), pointer(grad_bias), pointer(partials),
        grad_out.data_ptr(), pointer(grad_summed), saved.data_ptr(), pointer(mean), pointer(rstd),
        pointer(weight), pointer(bias),
        rows, cols, grad_out_stride, grad_summed_stride, saved_stride,
        DTYPE_CODES[x_dtype],
        0 if cast_dtype is None else DTYPE_CODES[cast_dtype],
        DTYPE_CODES[grad_out.dtype],
        0 if weight is None else DTYPE_CODES[weight.dtype],
        weight_offset, from_output, index, stream,
    )  # fmt: skip
    return grad_x, grad_cast, grad_weight, grad_bias


def _reference(centred, x, weight, bias, dims, eps, weight_offset, out_dtype):
    """The formula in torch's own differentiable ops: what a second derivative is taken of."""
    axes = tuple(range(-dims, 0))
    x = x.to(_statistics_dtype(x.dtype))
    if centred:
        x = x - x.mean(axes, keepdim=True)
    out = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.to(x.dtype) + weight_offset)
    return (out if bias is None else out + bias.to(x.dtype)).to(out_dtype)


# --- the short way: one autograd.Function around the bodies -----------------------------------------------------------


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias,
        centred, dims, eps, weight_offset, memory_efficient, out_dtype, summed_dtype,
    ):  # fmt: skip
        out, summed, mean, rstd = _forward(
            centred, input, residual, weight, bias, dims, eps, weight_offset, out_dtype, summed_dtype
        )
        x = input if residual is None else summed
        ctx.save_for_backward(out if memory_efficient else x, mean, rstd, weight, bias)
        ctx.arguments = (centred, dims, eps, weight_offset, memory_efficient, x.dtype, out_dtype)
        ctx.dtypes = (input.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        return out if residual is None else (out, summed)

    @staticmethod
    def backward(ctx, grad_out, grad_summed=None):
        saved, mean, rstd, weight, bias = ctx.saved_tensors
        centred, dims, eps, weight_offset, memory_efficient, x_dtype, out_dtype = ctx.arguments
        input_dtype, residual_dtype = ctx.dtypes
        wants_input, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        grad_x = grad_cast = grad_weight = grad_bias = None
        if grad_out is None:
            grad_x = grad_summed
        elif torch.is_grad_enabled():  # create_graph=True: the gradient itself must have one
            if memory_efficient:
                raise RuntimeError("bigmodel: memory_efficient=True has no second derivative; call with memory_efficient=False.")
            sources = [tensor for tensor in (saved, weight, bias) if tensor is not None and tensor.requires_grad]
            with torch.enable_grad():
                out = _reference(centred, saved, weight, bias, dims, eps, weight_offset, out_dtype)
            grads = iter(torch.autograd.grad(out, sources, grad_out, create_graph=True))
            grad_x = next(grads) if saved.requires_grad else None
            grad_weight = next(grads) if wants_weight else None
            grad_bias = next(grads) if wants_bias else None
            if grad_summed is not None and grad_x is not None:
                grad_x = grad_x + grad_summed
        else:
            cast_dtype = next((d for d in (input_dtype, residual_dtype) if d is not None and d is not x_dtype), None)
            grad_x, grad_cast, grad_weight, grad_bias = _backward(
                centred, grad_out, grad_summed, saved, mean, rstd, weight, bias,
                dims, weight_offset, memory_efficient, x_dtype, cast_dtype, wants_weight, wants_bias,
            )  # fmt: skip
        return (
            _in_dtype(grad_x, grad_cast, input_dtype) if wants_input else None,
            _in_dtype(grad_x, grad_cast, residual_dtype) if wants_residual else None,
            grad_weight, grad_bias, None, None, None, None, None, None, None,
        )  # fmt: skip


def _in_dtype(grad_x: Tensor | None, grad_cast: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad_x is None or grad_x.dtype is dtype:
        return grad_x
    return grad_cast if grad_cast is not None and grad_cast.dtype is dtype else grad_x.to(dtype)


# --- the long way: ops in torch's dispatcher --------------------------------------------------------------------------

_FORWARD_SCHEMA = (
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps, float weight_offset, "
    "bool memory_efficient, ScalarType out_dtype, ScalarType summed_dtype) "
    "-> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_summed, Tensor saved, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "int dims, float weight_offset, bool from_output, ScalarType x_dtype, ScalarType? cast_dtype, "
    "bool wants_weight, bool wants_bias) -> (Tensor grad_x, Tensor grad_cast, Tensor grad_weight, Tensor grad_bias)"
)


def _present(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A schema has no optional results: an empty tensor stands for one that does not exist."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _placements(spec, dims: int):
    """DTensor placements of one mesh dimension: row dimensions shard freely, normalised ones are replicated."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(i) for i in range(len(spec.tensor_meta.shape) - dims))]


def _forward_sharding(input, residual, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Replicate

    replicated = Replicate()
    return [
        (
            [rows, rows if residual is not None else replicated, rows, rows],
            [rows, None if residual is None else rows, None if weight is None else replicated,
             None if bias is None else replicated, None, *(None for _ in scalars)],
        )
        for rows in _placements(input, dims)
    ]  # fmt: skip


def _backward_sharding(grad_out, grad_summed, saved, mean, rstd, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Partial, Replicate

    replicated = Replicate()
    *_, cast_dtype, wants_weight, wants_bias = scalars
    strategies = []
    for rows in _placements(grad_out, dims):
        summed = replicated if rows == replicated else Partial()
        strategies.append((
            [rows, rows if cast_dtype is not None else replicated,
             summed if wants_weight else replicated, summed if wants_bias else replicated],
            [rows, None if grad_summed is None else rows, rows, rows, rows,
             None if weight is None else replicated, None if bias is None else replicated, None, *(None for _ in scalars)],
        ))  # fmt: skip
    return strategies


def _register(name: str, centred: bool):
    def forward(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, summed_dtype):
        results = _forward(centred, input, residual, weight, bias, dims, eps, weight_offset, out_dtype, summed_dtype)
        return _present(results, results[3])

    def forward_fake(input, residual, weight, bias, dims, eps, weight_offset, memory_efficient, out_dtype, summed_dtype):
        out = torch.empty(input.shape, dtype=out_dtype, device=input.device)
        summed = None if residual is None else torch.empty(input.shape, dtype=summed_dtype, device=input.device)
        dtype = _statistics_dtype(input.dtype if residual is None else summed_dtype)
        rstd = torch.empty(input.shape[: input.dim() - dims], dtype=dtype, device=input.device)
        return _present((out, summed, torch.empty_like(rstd) if centred else None, rstd), rstd)

    def backward(
        grad_out, grad_summed, saved, mean, rstd, weight, bias, dims, weight_offset, from_output, x_dtype, cast_dtype,
        wants_weight, wants_bias,
    ):  # fmt: skip
        grads = _backward(
            centred, grad_out, grad_summed, saved, mean if centred else None, rstd, weight, bias,
            dims, weight_offset, from_output, x_dtype, cast_dtype, wants_weight, wants_bias,
        )  # fmt: skip
        return _present(grads, rstd)

    def backward_fake(
        grad_out, grad_summed, saved, mean, rstd, weight, bias, dims, weight_offset, from_output, x_dtype, cast_dtype,
        wants_weight, wants_bias,
    ):  # fmt: skip
        grad_x = torch.empty(grad_out.shape, dtype=x_dtype, device=grad_out.device)
        grad_cast = None if cast_dtype is None else torch.empty_like(grad_x, dtype=cast_dtype)
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if wants_bias else None
        return _present((grad_x, grad_cast, grad_weight, grad_bias), rstd)

    def setup_context(ctx, inputs, output):
        input, residual, weight, bias, dims, _, weight_offset, memory_efficient, _, summed_dtype = inputs
        out, summed, mean, rstd = output
        saved = out if memory_efficient else input if residual is None else summed
        ctx.save_for_backward(saved, mean, rstd, weight, bias)
        x_dtype = input.dtype if residual is None else summed_dtype
        ctx.arguments = (dims, weight_offset, memory_efficient, x_dtype)
        ctx.dtypes = (input.dtype, None if residual is None else residual.dtype)
        ctx.out = (out.shape, out.dtype)

    def autograd_backward(ctx, grad_out, grad_summed, _grad_mean, _grad_rstd):
        saved, mean, rstd, weight, bias = ctx.saved_tensors
        dims, weight_offset, memory_efficient, x_dtype = ctx.arguments
        input_dtype, residual_dtype = ctx.dtypes
        wants_input, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        if residual_dtype is None:
            grad_summed = None
        if grad_out is None:
            shape, dtype = ctx.out
            grad_out = torch.zeros(shape, dtype=dtype, device=saved.device)
        cast_dtype = next((d for d in (input_dtype, residual_dtype) if d is not None and d != x_dtype), None)
        grad_x, grad_cast, grad_weight, grad_bias = backward_op(
            grad_out, grad_summed, saved, mean, rstd, weight, bias, dims, weight_offset, memory_efficient,
            x_dtype, cast_dtype, wants_weight, wants_bias,
        )  # fmt: skip
        grad_cast = None if cast_dtype is None else grad_cast
        return (
            _in_dtype(grad_x, grad_cast, input_dtype) if wants_input else None,
            _in_dtype(grad_x, grad_cast, residual_dtype) if wants_residual else None,
            grad_weight if wants_weight else None, grad_bias if wants_bias else None,
            None, None, None, None, None, None,
        )  # fmt: skip

    backward_op = _registry.register(
        f"{name}_backward", _BACKWARD_SCHEMA, backward, backward_fake, sharding=_backward_sharding
    )
    return _registry.register(
        f"{name}_forward", _FORWARD_SCHEMA, forward, forward_fake, autograd_backward, setup_context,
        sharding=_forward_sharding,
    )  # fmt: skip


_FORWARD_OPS = {False: _register("rms_norm", False), True: _register("layer_norm", True)}

# --- public functions -------------------------------------------------------------------------------------------------


def _norm(
    op, centred, input, residual, normalized_shape, weight, bias, eps,
    weight_offset, memory_efficient, out_dtype, residual_dtype=None,
):  # fmt: skip
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    summed_dtype = None
    if residual is not None:
        _check.tensor(op, "input", input)
        _check.tensor(op, "residual", residual)
        summed_dtype = torch.promote_types(input.dtype, residual.dtype) if residual_dtype is None else residual_dtype
    _check.tensor(op, "input", input)
    if eps is None:
        eps = _DEFAULT_EPS[input.dtype if residual is None else summed_dtype]
    if out_dtype is None:
        out_dtype = _registry.autocast_dtype(input)
    _check_arguments(op, input, residual, shape, weight, bias, eps, weight_offset, out_dtype, summed_dtype)
    dims = len(shape)
    tensors = (input, residual, weight, bias)
    if not _registry.direct(tensors):
        out, summed, _, _ = _registry.dispatch(
            _FORWARD_OPS[centred], *tensors, dims, eps, weight_offset, memory_efficient, out_dtype,
            input.dtype if residual is None else summed_dtype,
        )  # fmt: skip
        return out, summed
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        results = _Norm.apply(
            *tensors, centred, dims, eps, weight_offset, memory_efficient, out_dtype, summed_dtype
        )
        return (results, None) if residual is None else results
    return _forward(
        centred, *tensors, dims, eps, weight_offset, out_dtype, summed_dtype, statistics=False
    )[:2]


def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, weight_offset: float = 0.0, memory_efficient: bool = False, out_dtype: torch.dtype | None = None,
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
    """`rms_norm` of input + residual, and the sum: (normed, summed). Arguments as in `add_layer_norm` and `rms_norm`."""
    _check.tensor("add_rms_norm", "residual", residual)
    return _norm(
        "add_rms_norm", False, input, residual, normalized_shape, weight, None, eps,
        weight_offset, memory_efficient, out_dtype, residual_dtype,
    )  # fmt: skip
