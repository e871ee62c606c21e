"""Cases of the SGD row: a step with momentum; 20 bytes per float32 parameter, all but the gradient read and written."""

from __future__ import annotations

from functools import partial

import torch

from bigmodel import optim
from bigmodel.benchmarks import _updates
from bigmodel.benchmarks.goals import Goal
from bigmodel.benchmarks.harness import OURS, Case

OPTIONS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}


def _optimizer(name, params):
    if name == OURS:
        return optim.SGD(params, **OPTIONS)
    return torch.optim.SGD(params, **OPTIONS, **{name: True})


def _expected(value, grad):
    value, grad = value.double(), grad.double()
    grad = grad + OPTIONS["weight_decay"] * value
    return value - OPTIONS["lr"] * (1 + OPTIONS["momentum"]) * grad


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda"; `quick` takes many small tensors, `sweep` adds nothing."""
    make = partial(_updates.case, "sgd", 20, ("fused", "foreach"), _optimizer, _expected)
    return [make(shape) for shape in _updates.shapes(device, quick)]


def goals(device: str) -> list[Goal]:
    """What the row promises: ahead of torch's fused step."""
    return _updates.ahead_of("fused", cases(device))
