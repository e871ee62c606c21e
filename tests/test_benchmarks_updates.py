"""The contenders of the optimizer benchmarks compute the same thing: what float64 says a step must leave."""

import dataclasses

import pytest
import torch

from bigmodel.benchmarks import GROUPS, adam, load_group
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_with_masters(dtype):
    assert notes(adam._case("cpu", adam.MASTERS, dtype, (3, 5000))) == {}


@pytest.mark.parametrize("group", ["sgd", "adagrad", "ema", "grad_norm"])
def test_the_others(group):
    for case in load_group(group).cases("cpu", quick=True):
        assert notes(case) == {}, case.name


def test_what_is_timed_in_a_cuda_graph_can_be_captured(monkeypatch):
    """torch refuses to capture the step of an optimizer whose groups say that they are not capturable."""
    optimizers = []
    init = torch.optim.Optimizer.__init__

    def noted(self, *args):
        init(self, *args)
        optimizers.append(self)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", noted)
    cases = [case for group in GROUPS for case in load_group(group).cases("cuda") if case.mode == "step"]
    for case in filter(lambda case: case.launch_bound, cases):
        workload = case.build(torch.device("cpu"))
        for name in case.contenders:
            workload.make(name)
    assert {type(each).__name__ for each in optimizers} == {"AdamW", "SGD", "Adagrad"}
    assert all(group.get("capturable", True) for each in optimizers for group in each.param_groups)
    plain = adam._case("cuda", adam.STEP, torch.float32, (3, 50))
    optimizers.clear()
    plain.build(torch.device("cpu")).make(adam.OURS)
    assert not optimizers[0].defaults["capturable"]
