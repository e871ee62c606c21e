"""Cases of the Adagrad row: one step; 20 bytes per float32 parameter, all but the gradient read and written."""

from __future__ import annotations

from functools import partial

import torch

from bigmodel import optim
from bigmodel.benchmarks import _updates
from bigmodel.benchmarks.goals import Goal
from bigmodel.benchmarks.harness import OURS, Case

OPTIONS = {"lr": 1e-2, "weight_decay": 1e-2, "initial_accumulator_value": 0.1, "eps": 1e-10}


def _optimizer(name, params):
    if name == OURS:
        return optim.Adagrad(params, **OPTIONS)
    return torch.optim.Adagrad(params, **OPTIONS, **{name: True})


def _expected(value, grad):
    value, grad = value.double(), grad.double()
    grad = grad + OPTIONS["weight_decay"] * value
    root = (OPTIONS["initial_accumulator_value"] + grad.square()).sqrt()
    return value - OPTIONS["lr"] * grad / (root + OPTIONS["eps"])


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda"; `quick` takes many small tensors, `sweep` adds nothing."""
    stock = ("fused", "foreach") if device == "cpu" else ("foreach",)  # torch has no fused Adagrad for CUDA
    make = partial(_updates.case, "adagrad", 20, stock, _optimizer, _expected)
    return [make(shape) for shape in _updates.shapes(device, quick)]


def goals(device: str) -> list[Goal]:
    """What the row promises: ahead of torch's foreach step."""
    return _updates.ahead_of("foreach", cases(device))
