"""Clipping of gradients by their global norm, for other optimizers."""

from __future__ import annotations

import math
import threading
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel import _check
from bigmodel.ops import TableCache, grad_clip, grad_scale_
from bigmodel.ops._table import dense
from bigmodel.optim import _total
from bigmodel.optim._distributed import all_plain, device_of, is_dtensor, local_gradient, spread_of

_OP = "clip_grad_norm_"


class _Tables(threading.local):
    """The last tables of a thread, which hold addresses and no tensors: gradients that stay where they are, or come
    back to where they were, need no new ones. Of 500 small tensors they are most of a call."""

    def __init__(self) -> None:
        self.totals: dict[Any, TableCache] = {}
        self.scaled: dict[torch.device, TableCache] = {}


_tables = _Tables()


def _parts(parameters: Sequence[Tensor]) -> _total.Parts:
    """The gradients by where they are; with empty lists for shards whose gradients only other processes have."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if any([grad.layout is not torch.strided for grad in grads]):  # noqa: C419, a generator takes twice the time
        raise RuntimeError("clip_grad_norm_ does not support sparse gradients; use torch.nn.utils's.")
    if all_plain(parameters) and all_plain(grads) and len(set(map(Tensor.get_device, grads))) == 1:
        return {(grads[0].device, None): grads}
    parts: _total.Parts = {}
    for param in parameters:
        if param.grad is None and not (is_dtensor(param) and param.requires_grad):
            continue
        part = parts.setdefault((device_of(param), spread_of(param)), [])
        if param.grad is not None:
            part.append(local_gradient(param, param.grad))
    return parts


def _number(name: str, value: Any) -> float:
    """Of a number, or of one in a tensor or as text ("inf"), as torch takes them."""
    if isinstance(value, (Tensor, str)):
        try:
            return float(value)
        except (RuntimeError, ValueError):
            what = repr(value) if isinstance(value, str) else f"a tensor of shape {tuple(value.shape)}"
            raise TypeError(f"{_OP}: {name} must be a number, got {what}.") from None
    return float(_check.real(_OP, name, value))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: scales all gradients in place by min(1, max_norm / (norm + 1e-6)).

    Reads the gradients once, and writes them only if they are to be clipped. Deterministic, and independent of the
    number of threads.

    Args:
        parameters: a tensor or tensors with gradients on any devices, DTensors included; None gradients are left out.
        max_norm: what the norm is brought down to.
        norm_type: 1, 2 and inf are computed here; any other is torch's.
        error_if_nonfinite: RuntimeError if the norm is infinite or NaN; waits for the device.
        foreach: accepted, without effect.

    Returns:
        The norm before clipping, over all shards and devices: a plain scalar tensor on the first gradient's device,
        float32 (float64 if a gradient is).

    Raises:
        TypeError: what is no tensor among the parameters; max_norm, norm_type or error_if_nonfinite of another type.
        ValueError: max_norm below 0 or NaN.
        RuntimeError: sparse gradients; a norm that is infinite or NaN, if asked for.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        if not isinstance(parameters, Iterable):
            raise TypeError(f"{_OP}: parameters must be a tensor or tensors, got {_check.kind(parameters)}.")
        generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if not all_plain(parameters):
            for row, param in enumerate(parameters):
                if not isinstance(param, Tensor):
                    raise TypeError(f"{_OP}: parameters[{row}] must be a torch.Tensor, got {_check.kind(param)}.")
        if generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", UserWarning, stacklevel=3
            )
    max_norm, norm_type = _number("max_norm", max_norm), _number("norm_type", norm_type)
    if not max_norm >= 0:
        raise ValueError(f"{_OP}: max_norm is {max_norm}; it must be at least 0.")
    _check.flag(_OP, "error_if_nonfinite", error_if_nonfinite)
    if norm_type not in (1.0, 2.0, math.inf):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    parts = _parts(parameters)
    if not parts:
        return torch.tensor(0.0)
    home = next(iter(parts))[0]
    spread = any(key[1] is not None for key in parts)
    total = _total.total(parts, norm_type, home, None if spread else _tables.totals)
    clip = grad_clip(total, max_norm, norm_type, norm_dtype=_total.norm_dtype(parts))
    if error_if_nonfinite and not clip.norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    for (device, _), grads in parts.items():
        factor = clip.factor.to(device, non_blocking=True)
        scattered = [grad for grad in grads if not dense(grad)]
        if scattered:
            grads = [grad for grad in grads if dense(grad)]
            for grad in scattered:
                grad.mul_(factor)
        grad_scale_(grads, factor, cache=_tables.scaled.setdefault(device, TableCache()))
    return clip.norm
