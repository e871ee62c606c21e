"""What the rows' files share: each case of a group, under pytest-benchmark, one test for each contender.

For tracking one machine over time (--benchmark-autosave, --benchmark-compare). The figures of docs/results come from
`bigmodel bench`, which interleaves the contenders and checks what they return.
"""

import importlib

import pytest
import torch

from bigmodel.benchmarks import run
from bigmodel.benchmarks.harness import timer_for

DEVICE = run.default_device()


def pytest_generate_tests(metafunc):
    """Gives the test of bench_<group>.py every case of its group."""
    group = metafunc.module.__name__.removeprefix("bench_")
    cases = importlib.import_module(f"bigmodel.benchmarks.{group}").cases(DEVICE)
    pairs = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in case.contenders]
    metafunc.parametrize(("workload", "name"), pairs, indirect=["workload"])


@pytest.fixture(scope="module")
def workload(request):
    return request.param.build(timer_for(DEVICE).device)


@pytest.fixture
def measure(benchmark, request, workload, name):
    """Times one contender of one case."""
    case = request.node.callspec.params["workload"]
    contender = workload.make(name)
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.bytes

    def call():
        contender.call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    def timed():
        if contender.leaves:
            rounds = 200 if case.launch_bound else 10
            benchmark.pedantic(call, setup=contender.reset, rounds=rounds, warmup_rounds=2)
        else:
            benchmark(call)

    return timed
