"""The norm of all gradients as of one vector, over devices and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel.ops import TableCache, grad_total
from bigmodel.optim._distributed import Spread

# Local gradients by the device that they are on and the way in which they are spread over processes.
Parts = dict[tuple[torch.device, Spread | None], list[Tensor]]


def total(parts: Parts, norm_type: float, home: torch.device, caches: dict | None = None) -> Tensor:
    """`grad_total` of everything, as a float64 scalar on `home`; every process that shares a part has to call it.

    Args:
        parts: no gradients, for a part that has none here, count as 0.
        caches: keeps the tables between calls.
    """
    largest = norm_type == math.inf
    sums = []
    for key, grads in parts.items():
        device, spread = key
        cache = None if caches is None else caches.setdefault(key, TableCache())
        if grads:
            part = grad_total(grads, norm_type, cache=cache)
        else:
            part = torch.zeros((), dtype=torch.float64, device=device)
        if spread is not None:
            spread.reduce_(part, largest)
        sums.append(part.to(home, non_blocking=True))
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=home)
    if len(sums) == 1:
        return sums[0]
    return torch.stack(sums).amax() if largest else torch.stack(sums).sum()


def norm_dtype(parts: Parts) -> torch.dtype:
    wide = any(grad.dtype is torch.float64 for grads in parts.values() for grad in grads)
    return torch.float64 if wide else torch.float32
