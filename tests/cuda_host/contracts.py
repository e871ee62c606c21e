"""Which memory each native function may touch, from its arguments: what csrc/ops/*.h promise, in one place.

A contract turns the arguments of a call into `Matrix` rows. Inputs may only be read; every element of an output must be
written; scratch may be read once it is written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BYTES = (4, 2, 2, 8, 1)  # float32, bfloat16, float16, float64: DType in csrc/op.h; bytes and 8-bit codes: csrc/table.h
_FLOAT32, _FLOAT64, _BYTE = 0, 3, 4
_QUANT_BLOCK = 256


class Matrix(NamedTuple):
    name: str
    role: str  # input, output, scratch or updated
    address: int
    rows: int
    cols: int
    dtype: int
    stride: int | None = None  # elements from row to row; None for cols

    def row_bytes(self) -> int:
        return self.cols * self.element_bytes()

    def stride_bytes(self) -> int:
        return (self.cols if self.stride is None else self.stride) * self.element_bytes()

    def element_bytes(self) -> int:
        return _BYTES[self.dtype]


def _norm_forward(
    out, summed, mean, rstd, input, residual, weight, bias, rows, cols, input_stride, residual_stride,
    out_dtype, summed_dtype, input_dtype, residual_dtype, weight_dtype, eps, weight_offset, index, stream,
) -> Iterator[Matrix]:  # fmt: skip
    x_dtype = summed_dtype if residual else input_dtype
    statistics = _FLOAT64 if x_dtype == _FLOAT64 else _FLOAT32
    yield Matrix("out", "output", out, rows, cols, out_dtype)
    yield Matrix("summed", "output", summed, rows, cols, summed_dtype)
    yield Matrix("mean", "output", mean, 1, rows, statistics)
    yield Matrix("rstd", "output", rstd, 1, rows, statistics)
    yield Matrix("input", "input", input, rows, cols, input_dtype, input_stride)
    yield Matrix("residual", "input", residual, rows, cols, residual_dtype, residual_stride)
    yield Matrix("weight", "input", weight, 1, cols, weight_dtype)
    yield Matrix("bias", "input", bias, 1, cols, weight_dtype)


def _norm_backward(
    grad_x, grad_cast, grad_weight, grad_bias, partials, grad_out, grad_summed, saved, mean, rstd, weight, bias,
    rows, cols, grad_out_stride, grad_summed_stride, saved_stride, x_dtype, cast_dtype, out_dtype, weight_dtype,
    weight_offset, from_output, index, stream, *, blocks,
) -> Iterator[Matrix]:  # fmt: skip
    statistics = _FLOAT64 if x_dtype == _FLOAT64 else _FLOAT32
    yield Matrix("grad_x", "output", grad_x, rows, cols, x_dtype)
    yield Matrix("grad_cast", "output", grad_cast, rows, cols, cast_dtype)
    yield Matrix("grad_weight", "output", grad_weight, 1, cols, weight_dtype)
    yield Matrix("grad_bias", "output", grad_bias, 1, cols, weight_dtype)
    yield Matrix("partials", "scratch", partials, 2 * blocks(rows, cols, index), cols, statistics)
    yield Matrix("grad_out", "input", grad_out, rows, cols, out_dtype, grad_out_stride)
    yield Matrix("grad_summed", "input", grad_summed, rows, cols, x_dtype, grad_summed_stride)
    yield Matrix("saved", "input", saved, rows, cols, out_dtype if from_output else x_dtype, saved_stride)
    yield Matrix("mean", "input", mean, 1, rows, statistics)
    yield Matrix("rstd", "input", rstd, 1, rows, statistics)
    yield Matrix("weight", "input", weight, 1, cols, weight_dtype)
    yield Matrix("bias", "input", bias, 1, cols, weight_dtype)


def _rows(table, rows, names) -> Iterator[tuple[int, int, dict[str, tuple[int, int]]]]:
    """(row, elements, {name: (address, format)}) of a table laid out as csrc/table.h says."""
    values = (ctypes.c_int64 * (rows * (2 + len(names)))).from_address(table)
    for row in range(rows):
        formats = values[rows + row]
        yield row, values[row], {
            name: (values[(2 + i) * rows + row], formats >> 8 * i & 255 if i < 8 else _FLOAT32)
            for i, name in enumerate(names)
        }  # fmt: skip


def _columns(table, rows, names, read=(), ones=(), scales=()) -> Iterator[Matrix]:
    """The streams of a table: updated, but for those that are only read; some of one element, or one per block."""
    for row, elements, streams in _rows(table, rows, names):
        for name, (address, dtype) in streams.items():
            size = 1 if name in ones else -(-elements // _QUANT_BLOCK) if name in scales else elements
            yield Matrix(f"{name}[{row}]", "input" if name in read else "updated", address, 1, size, dtype)


def _scalars(factor, grad_scale, found_inf) -> Iterator[Matrix]:
    yield Matrix("factor", "input", factor, 1, 1, _FLOAT64)
    yield Matrix("grad_scale", "input", grad_scale, 1, 1, _FLOAT32)
    yield Matrix("found_inf", "input", found_inf, 1, 1, _FLOAT32)


def _adam(table, rows, factor, grad_scale, found_inf, maximize, lr, lr_address, lr_dtype, *rest) -> Iterator[Matrix]:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ema", "step",
             "exp_avg_scale", "exp_avg_sq_scale")  # fmt: skip
    yield from _columns(table, rows, names, ("grad",), ("step",), names[8:])
    yield from _scalars(factor, grad_scale, found_inf)
    yield Matrix("lr", "input", lr_address, 1, 1, lr_dtype)
    yield Matrix("scratch", "scratch", rest[-3], rows, 4, _FLOAT64)


def _sgd(table, rows, factor, grad_scale, found_inf, maximize, lr, lr_address, lr_dtype, *rest) -> Iterator[Matrix]:
    yield from _columns(table, rows, ("param", "grad", "momentum", "started"), ("grad",), ("started",))
    yield from _scalars(factor, grad_scale, found_inf)
    yield Matrix("lr", "input", lr_address, 1, 1, lr_dtype)
    yield Matrix("scratch", "scratch", rest[-3], rows, 4, _FLOAT64)


def _adagrad(table, rows, factor, grad_scale, found_inf, maximize, lr, lr_address, lr_dtype, *rest) -> Iterator[Matrix]:
    yield from _columns(table, rows, ("param", "grad", "sum", "step"), ("grad",), ("step",))
    yield from _scalars(factor, grad_scale, found_inf)
    yield Matrix("lr", "input", lr_address, 1, 1, lr_dtype)
    yield Matrix("scratch", "scratch", rest[-3], rows, 4, _FLOAT64)


def _ema(table, rows, decay, index, stream) -> Iterator[Matrix]:
    yield from _columns(table, rows, ("average", "value"), ("value",))


def _grad_total(total, partials, table, rows, power, index, stream, *, count) -> Iterator[Matrix]:
    yield Matrix("total", "output", total, 1, 1, _FLOAT64)
    yield Matrix("partials", "scratch", partials, 1, count(table, rows), _FLOAT64)
    yield from _columns(table, rows, ("grad",), ("grad",))


def _grad_clip(
    norm,
    factor,
    skip,
    skipped,
    total,
    grad_scale,
    found_inf,
    norm_dtype,
    power,
    max_norm,
    skip_nonfinite,
    index,
    stream,
) -> Iterator[Matrix]:
    yield Matrix("norm", "output", norm, 1, 1, norm_dtype)
    yield Matrix("factor", "output", factor, 1, 1, _FLOAT64)
    yield Matrix("skip", "output", skip, 1, 1, _FLOAT32)
    yield Matrix("skipped", "updated", skipped, 1, 1, _FLOAT32)
    yield Matrix("total", "input", total, 1, 1, _FLOAT64)
    yield from _scalars(0, grad_scale, found_inf)


def _grad_scale(table, rows, factor, index, stream) -> Iterator[Matrix]:
    yield from _columns(table, rows, ("grad",))
    yield from _scalars(factor, 0, 0)


def _strided(name, role, address, sizes, strides, dtype) -> Matrix:
    """A tensor of any strides: as rows at one distance where it is that, else as one row of all that it spans."""
    while len(sizes) > 2 and (sizes[0] == 1 or sizes[1] == 1 or strides[0] == strides[1] * sizes[1]):
        keep = 0 if sizes[1] == 1 else 1
        sizes = (sizes[0] * sizes[1], *sizes[2:])
        strides = (strides[keep], *strides[2:])
    if len(sizes) == 2 and strides[1] == 1 and (strides[0] >= sizes[1] or sizes[0] == 1):
        return Matrix(name, role, address, *sizes, dtype, strides[0] if sizes[0] > 1 else None)
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return Matrix(name, "updated" if role == "output" else role, address, 1, span, dtype)


def _attention_softmax_forward(
    out, probs, sink_probs, scores, mask, slopes, sinks, rows, out_strides, scores_strides, mask_strides,
    mask_key_stride, out_dtype, scores_dtype, mask_dtype, empty_is_nan, index, stream,
) -> Iterator[Matrix]:  # fmt: skip
    dims, keys, _, _, seed, *_ = rows
    count = dims[0] * dims[1] * dims[2] * dims[3]
    compute = _FLOAT64 if scores_dtype == _FLOAT64 else _FLOAT32
    sizes = (*dims, keys)
    role = "updated" if out == scores else "output"
    yield _strided("out", role, out, sizes, (*out_strides, 1), out_dtype)
    yield Matrix("probs", "output", probs, count, keys, out_dtype)
    yield Matrix("sink_probs", "output", sink_probs, 1, count, compute)
    if out != scores:
        yield _strided("scores", "input", scores, sizes, (*scores_strides, 1), scores_dtype)
    held = [size if stride else 1 for size, stride in zip(sizes, (*mask_strides, mask_key_stride), strict=True)]
    mask_strides = (*mask_strides, mask_key_stride)
    yield _strided("mask", "input", mask, held, mask_strides, _BYTE if mask_dtype < 0 else mask_dtype)
    yield Matrix("slopes", "input", slopes, 1, dims[2], compute)
    yield Matrix("sinks", "input", sinks, 1, dims[2], compute)
    yield Matrix("seed", "input", seed, 1, 1, _FLOAT64)


def _attention_softmax_backward(
    grad_scores, grad_mask, grad_sinks, scratch, grad_out, saved, scores, sink_probs, rows, grad_out_strides,
    scores_strides, mask_dims, mask_keys, out_dtype, scores_dtype, index, stream, *, scratch_size,
) -> Iterator[Matrix]:  # fmt: skip
    dims, keys, _, _, seed, *_ = rows
    count = dims[0] * dims[1] * dims[2] * dims[3]
    compute = _FLOAT64 if scores_dtype == _FLOAT64 else _FLOAT32
    mask_rows = mask_dims[0] * mask_dims[1] * mask_dims[2] * mask_dims[3]
    size = scratch_size(count, keys, grad_mask != 0, grad_sinks != 0, index)
    yield Matrix("grad_scores", "output", grad_scores, count, keys, scores_dtype)
    yield Matrix("grad_mask", "output", grad_mask, mask_rows, mask_keys, compute)
    yield Matrix("grad_sinks", "output", grad_sinks, 1, dims[2], compute)
    yield Matrix("scratch", "scratch", scratch, 1, size, compute)
    yield _strided("grad_out", "input", grad_out, (*dims, keys), (*grad_out_strides, 1), out_dtype)
    yield Matrix("saved", "input", saved, count, keys, out_dtype)
    yield _strided("scores", "input", scores, (*dims, keys), (*scores_strides, 1), scores_dtype)
    yield Matrix("sink_probs", "input", sink_probs, 1, count, compute)
    yield Matrix("seed", "input", seed, 1, 1, _FLOAT64)


def _softmax_forward(out, input, rows, cols, log, out_dtype, input_dtype, index, stream) -> Iterator[Matrix]:
    yield Matrix("out", "output", out, rows, cols, out_dtype)
    yield Matrix("input", "input", input, rows, cols, input_dtype)


def _softmax_backward(
    grad, grad_out, out, rows, cols, log, out_dtype, input_dtype, index, stream
) -> Iterator[Matrix]:  # fmt: skip
    yield Matrix("grad", "output", grad, rows, cols, input_dtype)
    yield Matrix("grad_out", "input", grad_out, rows, cols, out_dtype)
    yield Matrix("out", "input", out, rows, cols, out_dtype)


def of(module) -> dict[str, Callable[..., Iterator[Matrix]]]:
    """The contracts of a module's functions by name; functions that touch no tensor have none."""

    def norm_backward(*args):
        return _norm_backward(*args, blocks=module.norm_backward_blocks)

    def grad_total(*args):
        return _grad_total(*args, count=module.grad_total_partials)

    def attention_softmax_backward(*args):
        return _attention_softmax_backward(*args, scratch_size=module.softmax_backward_scratch)

    return {
        "adam": _adam,
        "sgd": _sgd,
        "adagrad": _adagrad,
        "ema": _ema,
        "grad_total": grad_total,
        "grad_clip": _grad_clip,
        "grad_scale": _grad_scale,
        "attention_softmax_forward": _attention_softmax_forward,
        "attention_softmax_backward": attention_softmax_backward,
        "softmax_forward": _softmax_forward,
        "softmax_backward": _softmax_backward,
        "layer_norm_forward": _norm_forward,
        "rms_norm_forward": _norm_forward,
        "layer_norm_backward": norm_backward,
        "rms_norm_backward": norm_backward,
    }
