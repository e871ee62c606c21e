"""The norm of many gradients as of one vector, and clipping by it. Formulas: csrc/ops/grad_norm.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.ops import _multi_tensor
from bigmodel.ops._table import Stream, TableCache

_POWERS = {1.0: 1, 2.0: 2, math.inf: 0}


class Clip(NamedTuple):
    """What `grad_clip` gives: scalars on the gradients' device.

    Attributes:
        norm: the norm of the unscaled gradients, before clipping.
        factor: float64; what clipping multiplies the unscaled gradients by, at most 1: `grad_factor` of the updates.
        skip: float32; 1 where nothing should be written, else 0: `found_inf` of the updates.
    """

    norm: Tensor
    factor: Tensor
    skip: Tensor


def _power(op: str, norm_type: float) -> int:
    if not isinstance(norm_type, Real) or norm_type not in _POWERS:
        raise ValueError(f"{op}: norm_type is {norm_type!r}; supported are 1, 2 and inf.")
    return _POWERS[norm_type]


def _total_body(grads, norm_type, cache=None):
    if not grads:
        raise ValueError("grad_total: grads is empty; there must be at least one tensor.")
    table = _multi_tensor.table("grad_total", cache, (Stream("grads", grads, restride=True),))
    total = torch.empty((), dtype=torch.float64, device=table.device)
    native = _registry.native(grads[0])
    partials = torch.empty(
        native.grad_total_partials(table.pointer, table.rows), dtype=torch.float64, device=table.device
    )
    native.grad_total(
        total.data_ptr(), partials.data_ptr(), table.pointer, table.rows, _power("grad_total", norm_type),
        *_registry.place(grads[0]),
    )  # fmt: skip
    return total


_TOTAL = _registry.register(
    "grad_total",
    "(Tensor[] grads, float norm_type) -> Tensor",
    _total_body,
    lambda grads, norm_type: grads[0].new_empty((), dtype=torch.float64),
)


def grad_total(grads: Sequence[Tensor], norm_type: float = 2.0, *, cache: TableCache | None = None) -> Tensor:
    """What the norm is the root of: sum |g|^norm_type over all elements, or max |g| for norm_type inf.

    Deterministic, and independent of the number of threads. Totals of shards, or of devices, may be added up (for inf:
    their maximum taken) before `grad_clip`.

    Args:
        grads: at least one tensor, all of one device, float32, bfloat16, float16 or float64; scattered or overlapping
            ones are copied first.
        norm_type: 1, 2 or inf.
        cache: keeps the table of addresses between calls with the same tensors.

    Returns:
        A float64 scalar on their device, without gradient.

    Raises:
        TypeError, ValueError: no tensors; another norm_type; a tensor of another dtype or device, naming its row.
    """
    direct = _multi_tensor.direct("grad_total", cache, {"grads": grads}, "grads")
    _power("grad_total", norm_type)
    if direct:
        return _total_body(grads, norm_type, cache)
    return _registry.dispatch(_TOTAL, grads, float(norm_type))


def _clip_body(total, grad_scale, found_inf, skipped, max_norm, norm_type, skip_nonfinite, norm_dtype):
    norm = torch.empty((), dtype=norm_dtype, device=total.device)
    factor = torch.empty((), dtype=torch.float64, device=total.device)
    skip = torch.empty((), dtype=torch.float32, device=total.device)
    _registry.native(total).grad_clip(
        norm.data_ptr(), factor.data_ptr(), skip.data_ptr(), _registry.pointer(skipped), total.data_ptr(),
        _registry.pointer(grad_scale), _registry.pointer(found_inf),
        DTYPE_CODES[norm_dtype], _power("grad_clip", norm_type), max_norm, skip_nonfinite, *_registry.place(total),
    )  # fmt: skip
    if skipped is not None:
        _multi_tensor.wrote([skipped])
    return norm, factor, skip


def _check_clip(
    total: Any, grad_scale: Any, found_inf: Any, skipped: Any, max_norm: Any, norm_type: Any, skip_nonfinite: Any,
    norm_dtype: Any,
) -> float:  # fmt: skip
    """max_norm as a float, or one sentence."""
    if not isinstance(total, Tensor):
        raise TypeError(f"grad_clip: total must be a torch.Tensor, got {_check.kind(total)}.")
    if total.dtype is not torch.float64 or total.numel() != 1:
        raise ValueError(f"grad_clip: total is {total.dtype} with {total.numel()} elements; it must be grad_total's.")
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf), ("skipped", skipped)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"grad_clip: {name} must be a torch.Tensor or None, got {_check.kind(value)}.")
        if value.dtype is not torch.float32 or value.numel() != 1 or value.device != total.device:
            raise ValueError(
                f"grad_clip: {name} is {value.dtype} with {value.numel()} elements on '{value.device}'; "
                f"it must be one float32 element on '{total.device}'."
            )
    if not _check.real("grad_clip", "max_norm", max_norm) >= 0:
        raise ValueError(f"grad_clip: max_norm is {max_norm}; it must be at least 0.")
    _power("grad_clip", norm_type)
    _check.flag("grad_clip", "skip_nonfinite", skip_nonfinite)
    if norm_dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grad_clip: norm_dtype is {norm_dtype}; supported are float32 and float64.")
    return float(_check.real("grad_clip", "max_norm", max_norm))


def _clip_dispatched(*arguments):
    _check_clip(*arguments)
    return _clip_body(*arguments)


def _clip_fake(total, grad_scale, found_inf, skipped, max_norm, norm_type, skip_nonfinite, norm_dtype):
    norm = total.new_empty((), dtype=norm_dtype)
    return norm, torch.empty_like(total), total.new_empty((), dtype=torch.float32)


_CLIP = _registry.register(
    "grad_clip",
    "(Tensor total, Tensor? grad_scale, Tensor? found_inf, Tensor(a!)? skipped, float max_norm, float norm_type, "
    "bool skip_nonfinite, ScalarType norm_dtype) -> (Tensor norm, Tensor factor, Tensor skip)",
    _clip_dispatched,
    _clip_fake,
)


def grad_clip(
    total: Tensor, max_norm: float, norm_type: float = 2.0, *, grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None, skip_nonfinite: bool = False, skipped: Tensor | None = None,
    norm_dtype: torch.dtype = torch.float32,
) -> Clip:  # fmt: skip
    """The norm, the factor that brings it down to max_norm, and whether to skip the step, with no synchronisation::

        norm = total ^ (1 / norm_type) / grad_scale
        factor = min(1, max_norm / (norm + 1e-6))        as torch.nn.utils.clip_grad_norm_ has it
        skip = found_inf != 0, or skip_nonfinite and norm is infinite or NaN
        skipped += skip

    Args:
        total: what `grad_total` gave, added up over shards.
        max_norm: inf for a factor of 1.
        grad_scale, found_inf: float32 scalars on total's device (torch.amp.GradScaler).
        skipped: a float32 scalar on total's device that counts skipped steps, written in place.
        norm_dtype: of `norm`, torch.float32 or torch.float64.

    Raises:
        TypeError, ValueError: one sentence naming the argument.
    """
    max_norm = _check_clip(total, grad_scale, found_inf, skipped, max_norm, norm_type, skip_nonfinite, norm_dtype)
    tensors = (total, grad_scale, found_inf, skipped)
    scalars = (max_norm, float(norm_type), skip_nonfinite, norm_dtype)
    if _registry.direct(tensors):
        return Clip(*_clip_body(*tensors, *scalars))
    return Clip(*_registry.dispatch(_CLIP, *tensors, *scalars))


def _scale_body(grads, factor, cache=None):
    if not grads:
        return
    table = _multi_tensor.table("grad_scale_", cache, (Stream("grads", grads),))
    address = _multi_tensor.scalar("grad_scale_", "factor", factor, table, (torch.float64,))
    _registry.native(grads[0]).grad_scale(table.pointer, table.rows, address, *_registry.place(grads[0]))
    _multi_tensor.wrote(grads)


_SCALE = _registry.register(
    "grad_scale_", "(Tensor(a!)[] grads, Tensor factor) -> ()", _scale_body, lambda *arguments: None
)


def grad_scale_(grads: Sequence[Tensor], factor: Tensor, *, cache: TableCache | None = None) -> None:
    """grads[i] *= factor for all i, in place; memory is not touched where factor is 1.

    Args:
        grads: of one device, dense in any order; float32, bfloat16, float16 or float64.
        factor: a float64 scalar on their device.
        cache: keeps the table of addresses between calls with the same tensors.

    Raises:
        TypeError, ValueError: one sentence naming the argument and the row.
    """
    if not isinstance(factor, Tensor):
        raise TypeError(f"grad_scale_: factor must be a torch.Tensor, got {_check.kind(factor)}.")
    if _multi_tensor.direct("grad_scale_", cache, {"grads": grads}):
        _scale_body(grads, factor, cache)
    else:
        _registry.dispatch(_SCALE, grads, factor)
