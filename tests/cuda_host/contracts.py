"""Which memory each native function may touch, from its arguments: what csrc/ops/*.h promise, in one place.

A contract turns the arguments of a call into `Matrix` rows. Inputs may only be read; every element of an output must be
written; scratch may be read once it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

_BYTES = (4, 2, 2, 8)  # float32, bfloat16, float16, float64: DType in csrc/op.h
_FLOAT32, _FLOAT64 = 0, 3


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


def of(module) -> dict[str, Callable[..., Iterator[Matrix]]]:
    """The contracts of a module's functions by name; functions that touch no tensor have none."""

    def norm_backward(*args):
        return _norm_backward(*args, blocks=module.norm_backward_blocks)

    return {
        "layer_norm_forward": _norm_forward,
        "rms_norm_forward": _norm_forward,
        "layer_norm_backward": norm_backward,
        "rms_norm_backward": norm_backward,
    }
