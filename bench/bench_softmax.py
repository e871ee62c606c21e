"""The softmax cases under pytest-benchmark: `pytest bench/bench_softmax.py`.

For tracking one machine over time (--benchmark-autosave, --benchmark-compare). The figures of docs/results come from
`bigmodel bench softmax`, which interleaves the contenders and checks what they return.
"""

import pytest
import torch

from bigmodel.benchmarks import run, softmax
from bigmodel.benchmarks.harness import Contender, Workload, timer_for

DEVICE = run.default_device()
CASES = softmax.cases(DEVICE)
PAIRS = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.contenders]


@pytest.fixture(scope="module")
def workload(request) -> Workload:
    return request.param.build(timer_for(DEVICE).device)


def synchronous(contender: Contender):
    if DEVICE == "cpu":
        return contender.call

    def call():
        contender.call()
        torch.cuda.synchronize()

    return call


@pytest.mark.parametrize(("workload", "name"), PAIRS, indirect=["workload"])
def test_softmax(benchmark, request, workload, name):
    case = request.node.callspec.params["workload"]
    contender = workload.make(name)
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.bytes
    if contender.leaves:
        rounds = 200 if case.launch_bound else 10
        benchmark.pedantic(synchronous(contender), setup=contender.reset, rounds=rounds, warmup_rounds=2)
    else:
        benchmark(synchronous(contender))
