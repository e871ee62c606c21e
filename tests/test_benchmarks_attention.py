"""The attention group of the benchmarks: every contender gives the model's result, and the goals name cases."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bigmodel.benchmarks import attention  # noqa: E402
from bigmodel.benchmarks.harness import COPY, OURS, CpuTimer, Effort, measure  # noqa: E402

BRIEF = Effort(seconds=0.0, min_rounds=1, max_rounds=1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(attention, "BATCH", {160: 2})  # longer than the sliding window of GPT-OSS
    monkeypatch.setattr(attention, "HEADS", 4)
    monkeypatch.setitem(attention._CONFIG, "num_attention_heads", 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [attention.CAUSAL, attention.PADDED])
@pytest.mark.parametrize("name", attention.MODELS)
def test_contenders_agree_on_the_attention(name, kind, small):
    for dtype in attention.FLOATS:
        row = measure(attention.attention_case(name, kind, 160, dtype), CpuTimer(), BRIEF)
        assert row.notes == {} and set(row.times) == {OURS, "eager", "compile", COPY}
        assert row.bytes == 5 * 2 * 4 * 160 * 160 * dtype.itemsize


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", attention.MODELS)
def test_contenders_agree_on_the_step(name, small):
    case = attention.step_case(name, torch.float32, 160)
    assert case.contenders == (OURS, "eager", "compile")
    # Tracing a model for torch.compile takes half a minute.
    row = measure(replace(case, contenders=(OURS, "eager")), CpuTimer(), BRIEF)
    assert row.notes == {} and set(row.times) == {OURS, "eager", COPY}


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["on cpu", "on a gpu"])
def test_goals_name_cases_that_are_measured(device):
    goals = attention.goals(device)
    names = {case.name for case in attention.cases(device)}
    assert {goal.case for goal in goals} <= names and {goal.limit for goal in goals} == {1.3}
    assert len(attention.cases(device, quick=True)) < len(names)
