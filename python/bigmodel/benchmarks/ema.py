"""Cases of the EMA row: averages of many weights; 12 bytes per float32 element, the average read and written."""

from __future__ import annotations

from functools import partial

import torch

from bigmodel.benchmarks import _updates
from bigmodel.benchmarks.goals import Goal
from bigmodel.benchmarks.harness import OURS, Case, Workload
from bigmodel.ops import TableCache, ema_

DECAY = 0.999


def _build(shape, device):
    averages = _updates.normal(shape, torch.float32, device)
    values = _updates.normal(shape, torch.float32, device, seed=1)

    def make(name):
        own = [average.clone() for average in averages]
        if name == OURS:
            return _updates.step(partial(ema_, own, values, DECAY, cache=TableCache()), own)
        return _updates.step(partial(torch._foreach_lerp_, own, values, 1 - DECAY), own)

    exact = zip(averages, values, strict=True)
    return Workload(make, [a.double() + (1 - DECAY) * (v.double() - a.double()) for a, v in exact])


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda"; `quick` takes many small tensors, `sweep` adds nothing."""
    return [
        Case(
            op="ema", mode="update", dtype=torch.float32, shape=shape, bytes=12 * shape[0] * shape[1],
            contenders=(OURS, "foreach"), build=partial(_build, shape), launch_bound=shape == _updates.MANY,
        )
        for shape in _updates.shapes(device, quick)
    ]  # fmt: skip


def goals(device: str) -> list[Goal]:
    """What the row promises: ahead of torch's foreach."""
    return _updates.ahead_of("foreach", cases(device))
