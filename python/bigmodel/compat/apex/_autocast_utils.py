"""apex's own rule under autocast, which is not torch's: every floating-point argument takes the autocast dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["_cast_if_autocast_enabled"]


def _autocast_enabled(device_type: str) -> bool:
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _cast(tensor: Tensor) -> Tensor:
    device_type = tensor.device.type
    if not _autocast_enabled(device_type) or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _cast_if_autocast_enabled(*args: Any) -> tuple[Any, ...]:
    """The arguments, with float tensors other than float64 in the autocast dtype of their own device, if it is on."""
    return tuple(_cast(arg) if isinstance(arg, Tensor) else arg for arg in args)
