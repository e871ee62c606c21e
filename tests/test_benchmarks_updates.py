"""The contenders of the optimizer benchmarks compute the same thing: what float64 says a step must leave."""

import dataclasses

import pytest
import torch

from bigmodel.benchmarks import adam, load_group
from bigmodel.benchmarks.harness import CpuTimer, Effort, measure
from bigmodel.benchmarks.run import telling_first

ONCE = Effort(seconds=0.0, min_rounds=1, max_rounds=1)
PEERS = ("bitsandbytes", "deepspeed")  # built or fetched on first use


def notes(case):
    own = tuple(name for name in case.contenders if name not in PEERS)
    return measure(dataclasses.replace(case, contenders=own), CpuTimer(), ONCE).notes


@pytest.mark.parametrize("mode", [adam.STEP, adam.IN_PLACE, adam.CLIP_EMA, adam.EIGHT_BIT])
def test_adam(mode):
    assert notes(adam._case("cpu", mode, torch.float32, (3, 5000))) == {}


def test_no_case_of_adam_waits_for_torch_compile_but_the_last_step():
    cases = {f"adam: {case.name}": case for case in adam.cases("cuda")}
    steps = [name for name in telling_first(cases) if cases[name].mode == adam.STEP]
    assert ["compile" in cases[name].contenders for name in steps] == [False, False, True]
    assert cases[steps[0]].shape == adam._updates.LARGE_CUDA and cases[steps[-1]].shape[0] <= 30


def test_adam_with_masters():
    assert notes(adam._case("cpu", adam.MASTERS, torch.bfloat16, (3, 5000))) == {}


@pytest.mark.parametrize("group", ["sgd", "adagrad", "ema", "grad_norm"])
def test_the_others(group):
    for case in load_group(group).cases("cpu", quick=True):
        assert notes(case) == {}, case.name
