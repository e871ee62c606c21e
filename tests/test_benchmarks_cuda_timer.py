"""How a GPU is timed, on a torch.cuda whose functions only note that they were called."""

import contextlib
import dataclasses

import pytest
import torch

from bigmodel.benchmarks import harness
from bigmodel.benchmarks.harness import COPY, OURS, Case, Contender, CpuTimer, CudaTimer, Effort, Workload

BRIEF = Effort(seconds=0.0, min_rounds=2, max_rounds=2)


class Device:
    """Notes what is asked of it; `begun` is what an event's query answers."""

    def __init__(self):
        self.log, self.begun, self.events = [], False, 0

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.number = device, device.events
        device.events += 1

    def record(self):
        self.device.log.append("end" if self.number % 2 else "start")

    def query(self):
        return self.device.begun

    def elapsed_time(self, other):
        assert "synchronize" in self.device.log and other.number == self.number + 1
        return 4.0


@pytest.fixture
def cuda(monkeypatch):
    """Patched are names that torch.cuda has, or this fails."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: device.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.log.append(("sleep", cycles)))
    monkeypatch.setattr(harness, "FLUSH_BYTES", 64)
    return device


@pytest.fixture
def timer(cuda):
    timer = CudaTimer(torch.device("cpu"))

    class Flush:
        def sum(self):  # reads, and leaves nothing to be written back
            cuda.log.append("flush")

    timer._flush = Flush()
    return timer


def test_only_the_call_lies_between_the_events_and_nothing_waits_in_between(cuda, timer):
    contender = Contender(lambda: cuda.log.append("call"), prepare=lambda: cuda.log.append("prepare"), lead=1e-3)
    assert timer.sample(contender, 3) == pytest.approx(4e-3)
    once = ["prepare", ("sleep", int(1e-3 * harness.CYCLES_PER_SECOND)), "flush", "start", "call", "end"]
    assert cuda.log == once * 3 + ["synchronize"]
    assert timer.late == 0


def test_a_device_that_waited_for_the_host_is_noted(cuda, timer):
    cuda.begun = True
    times = harness.interleave({"slow host": Contender(lambda: None)}, timer, BRIEF)
    assert times["slow host"].late == times["slow host"].samples == 2
    cuda.begun = False
    assert harness.interleave({"fast host": Contender(lambda: None)}, timer, BRIEF)["fast host"].late == 0


def test_the_lead_covers_what_the_host_needs(cuda, timer, monkeypatch):
    clock = iter([0.0, 3e-3, 10.0, 10.0 + 1e-3, 20.0, 20.0 + 2e-3])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    ready = timer.ready(Contender(lambda: cuda.log.append("call")), launch_bound=False)
    assert ready.lead == pytest.approx(2e-3)  # twice the least
    assert cuda.log == ["synchronize", "call"] * harness.WARM_UP


def test_a_launch_bound_call_becomes_a_graph(cuda, timer, monkeypatch):
    """Warmed up on another stream, captured once with its gradients unset, then replayed alone."""

    class Stream:
        def wait_stream(self, other):
            cuda.log.append("wait")

    class Graph:
        def replay(self):
            cuda.log.append("replay")

    class Capture:
        def __init__(self, subject):
            pass

        def __enter__(self):
            cuda.log.append("(")

        def __exit__(self, *error):
            cuda.log.append(")")

    for name, fake in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("CUDAGraph", Graph),
        ("graph", Capture),
        ("stream", Capture),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    leaf = torch.zeros(1, requires_grad=True)

    def call():
        assert leaf.grad is None
        leaf.grad = torch.ones(1)
        cuda.log.append("call")
        return leaf

    ready = timer.ready(Contender(call, [leaf]), launch_bound=True)
    warmed, captured = ["wait", "(", *["call"] * 3, ")", "wait"], ["(", "call", ")"]
    assert cuda.log == warmed + captured + ["synchronize", "replay"] * harness.WARM_UP
    assert ready.call() is leaf and cuda.log[-1] == "replay"


def test_a_capture_that_cannot_be_ended_leaves_the_stream_as_it_was(cuda, timer, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Capture:
        def __init__(self, subject):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("capture invalidated")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "set_stream", cuda.log.append)
    with pytest.raises(RuntimeError, match="invalidated"):
        timer.ready(Contender(lambda: None), launch_bound=True)
    assert cuda.log == [current]


def test_none_of_a_case_is_in_a_graph_where_one_cannot_be():
    class Timer(CpuTimer):
        asked = []

        def ready(self, contender, launch_bound):
            self.asked.append(launch_bound)
            if launch_bound and contender is makers["stock"]:
                raise RuntimeError("not capturable\nat line 3")
            return dataclasses.replace(contender, lead=1.0 if launch_bound else 0.0)

    right = torch.ones(4)
    makers = {name: Contender(lambda: right) for name in (OURS, "stock")}
    case = Case(
        "op",
        "step",
        torch.float32,
        (1, 4),
        32,
        (OURS, "stock"),
        lambda device: Workload(makers.get, [right.double()]),
        True,
    )
    row = harness.measure(case, Timer(), BRIEF)
    assert set(row.times) == {OURS, "stock", COPY}
    assert row.notes == {"CUDA graphs": "not used, since stock could not be captured: RuntimeError: not capturable"}
    assert Timer.asked[-3:] == [False] * 3
