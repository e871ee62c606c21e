"""Times several ways of computing the same thing, interleaved, against a copy of the bytes that must move.

A group (`bigmodel.benchmarks.norm`, ...) describes its cases; this file knows no op. How one case is measured:

1. Every contender runs once and is compared with a float64 reference; one that disagrees is timed and says so, one
   that cannot run says why and is left out.
2. Warm-up, then rounds. Each round times every contender once, and the copy, in an order of its own, so that what the
   machine does meanwhile falls on all of them alike. A sample of a short call averages many calls.
3. The figure is the median over rounds, with the least and the greatest beside it.

In the timed region: the call, the allocation of what it returns and its release, as in a training step. Outside it:
setting the gradients to None, and whatever a contender prepares.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

OURS = "bigmodel"
COPY = "copy"
FLOATS = (torch.float32, torch.bfloat16)  # in every case and over row lengths
FURTHER = (torch.float16, torch.float64)  # at one row length

# Allowed max |got - float64| over max |float64|: some roundings of the dtype, and the summation error of stock torch.
# It tells a wrong result from a right one; accuracy itself is what the tests measure.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}

WARM_UP = 3
SAMPLE_SECONDS = 2e-3  # a sample repeats the call to about this length: the clock's 50 ns are then nothing
FLUSH_BYTES = 512 << 20  # ten times the L2 of an H100
COPY_BYTES = 2 << 30  # the most that a copy's two buffers hold together; beyond it they are copied repeatedly
CYCLES_PER_SECOND = 2e9  # at least the clock of any GPU so far, so that a spin of n cycles is never too short
MAX_LEAD = 10e-3

Outputs = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way of computing a case's result.

    Attributes:
        call: what is timed; returns its output tensors (one, or a sequence).
        leaves: tensors that `call` leaves gradients in; their .grad is None before each call.
        prepare: untimed work before each call, after the gradients are reset.
        buffers: tensors that `call` knows by address only, kept alive here.
        lead: seconds for which a GPU is kept busy first, so that the host has enqueued the call when it begins.
    """

    call: Callable[[], Outputs]
    leaves: Sequence[torch.Tensor] = ()
    prepare: Callable[[], object] | None = None
    buffers: Sequence[torch.Tensor | None] = ()
    lead: float = 0.0

    def reset(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        if self.prepare is not None:
            self.prepare()

    def results(self) -> list[torch.Tensor | None]:
        """Runs once: the outputs, then the gradients of the leaves, None where none arrived."""
        self.reset()
        outputs = self.call()
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return [*tensors, *(leaf.grad for leaf in self.leaves)]


@dataclass(frozen=True)
class Workload:
    """A case with its tensors: `make` builds a contender by name, `expected` is what each must give, in float64."""

    make: Callable[[str], Contender]
    expected: list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What is computed, on what, and the bytes that must cross the memory bus for it at the least.

    Attributes:
        op, mode: e.g. "rms_norm", "forward+backward".
        dtype: of the tensors that carry the bytes.
        shape: (rows, cols).
        bytes: read plus written, each tensor once.
        contenders: the names that `Workload.make` knows, the library's own among them.
        build: allocates the workload on a device.
        launch_bound: so short that on a GPU it is timed as a CUDA graph.
        sweep: a point of the chart over row lengths instead of a line of the table.
    """

    op: str
    mode: str
    dtype: torch.dtype
    shape: tuple[int, int]
    bytes: int
    contenders: tuple[str, ...] = field(repr=False)
    build: Callable[[torch.device], Workload] = field(repr=False, compare=False)
    launch_bound: bool = False
    sweep: bool = False

    @property
    def name(self) -> str:
        return case_name(self.op, self.mode, str(self.dtype).removeprefix("torch."), self.shape)


def case_name(op: str, mode: str, dtype: str, shape: Sequence[int]) -> str:
    return f"{op} {mode} {dtype} {'x'.join(map(str, shape))}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the least and the greatest of `samples` samples of `calls` calls each.

    In `late` samples a GPU waited for the host's launches within the timed region: that time is the host's too.
    """

    median: float
    min: float
    max: float
    samples: int
    calls: int
    late: int = 0


@dataclass(frozen=True)
class Measurement:
    """A case's timings by contender, the copy among them; a note tells what was wrong with a contender."""

    case: str
    op: str
    mode: str
    dtype: str
    shape: tuple[int, int]
    bytes: int
    sweep: bool
    times: dict[str, Timing]
    notes: dict[str, str]

    def gigabytes_per_second(self, name: str) -> float:
        return self.bytes / self.times[name].median / 1e9

    def speed(self, name: str, other: str) -> float:
        """How many times as fast `name` is as `other`; against the copy, the share of its bandwidth."""
        return self.times[other].median / self.times[name].median

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping) -> Measurement:
        times = {name: Timing(**timing) for name, timing in record["times"].items()}
        return cls(**{**record, "shape": tuple(record["shape"]), "times": times})


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: rounds until about `seconds` have passed, within the two bounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Effort(seconds=2.0, min_rounds=7, max_rounds=50)
QUICK = Effort(seconds=0.3, min_rounds=3, max_rounds=15)
FULL_CUDA = Effort(seconds=0.5, min_rounds=7, max_rounds=50)  # device time varies less than a shared host's


class Timer(Protocol):
    """How a device tells time; a sample is at most `max_calls` calls, `late` counts samples as Timing has it."""

    device: torch.device
    max_calls: int
    late: int

    def ready(self, contender: Contender, launch_bound: bool) -> Contender:
        """The contender as this device runs it best; raises what capturing a launch-bound one in a graph raises."""
        ...

    def sample(self, contender: Contender, calls: int) -> float:
        """Mean seconds of one call over `calls` calls."""
        ...


class CpuTimer:
    """Wall-clock time. Without anything to reset, the calls run back to back within one interval."""

    device = torch.device("cpu")
    max_calls = 1000
    late = 0

    def ready(self, contender: Contender, launch_bound: bool) -> Contender:
        return contender

    def sample(self, contender: Contender, calls: int) -> float:
        call, clock = contender.call, time.perf_counter_ns
        if not contender.leaves and contender.prepare is None:
            start = clock()
            for _ in range(calls):
                call()
            return (clock() - start) / calls / 1e9
        total = 0
        for _ in range(calls):
            contender.reset()
            start = clock()
            call()
            total += clock() - start
        return total / calls / 1e9


class CudaTimer:
    """Device time between two events; nothing in between waits for the device.

    Before each call the L2 cache is filled with lines that are only read, so that no line is left in it whose writing
    back would be timed, and the device spins for as long as the host needs to enqueue the call, so that no gap between
    launches is. Launch-bound calls replay a CUDA graph. The copy is timed in the same way.
    """

    max_calls = 10  # every call has its own pair of events, and a flush that outlasts it

    def __init__(self, device: torch.device):
        self.device = device
        self.late = 0
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def ready(self, contender: Contender, launch_bound: bool) -> Contender:
        # A prepared contender keeps autograd state from outside the call, which a captured graph would not renew.
        if launch_bound and contender.prepare is None:
            contender = self._captured(contender)
        return replace(contender, lead=min(2 * self._enqueueing(contender), MAX_LEAD))

    def _captured(self, contender: Contender) -> Contender:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                contender.reset()
                contender.call()
        torch.cuda.current_stream().wait_stream(side)
        contender.reset()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                outputs = contender.call()
        except Exception:
            torch.cuda.set_stream(stream)  # torch leaves its own current where a capture cannot even be ended
            raise
        return Contender(partial(self._replay, graph, outputs, contender))

    @staticmethod
    def _enqueueing(contender: Contender) -> float:
        """Seconds after which a call returns to the host: the least of some."""
        seconds = math.inf
        for _ in range(WARM_UP):
            contender.reset()
            torch.cuda.synchronize()
            start = time.perf_counter()
            contender.call()
            seconds = min(seconds, time.perf_counter() - start)
        return seconds

    @staticmethod
    def _replay(graph: torch.cuda.CUDAGraph, outputs: Outputs, contender: Contender) -> Outputs:
        graph.replay()  # it has only the addresses of the contender's tensors, which therefore come along
        return outputs

    def sample(self, contender: Contender, calls: int) -> float:
        events, late = [], False
        for _ in range(calls):
            contender.reset()
            torch.cuda._sleep(int(contender.lead * CYCLES_PER_SECOND))
            self._flush.sum()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            contender.call()
            end.record()
            late |= start.query()  # begun before all of it was enqueued
            events.append((start, end))
        torch.cuda.synchronize()
        self.late += late
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


def timer_for(device: str) -> Timer:
    return CpuTimer() if device == "cpu" else CudaTimer(torch.device(device))


def measure(case: Case, timer: Timer, effort: Effort) -> Measurement:
    """Checks and times every contender of a case, and a copy of the same number of bytes."""
    workload = case.build(timer.device)
    contenders, notes = {}, {}
    for name in case.contenders:
        try:
            contenders[name] = workload.make(name)
            wrong = disagreement(contenders[name].results(), workload.expected, TOLERANCE[case.dtype])
        except Exception as error:  # a peer that cannot run here is part of the report, this library's failure is not
            if name == OURS:
                raise
            contenders.pop(name, None)
            notes[name] = f"not timed: {in_a_line(error)}"
        else:
            if wrong:
                notes[name] = wrong
    workload.expected.clear()
    contenders[COPY] = copy_contender(case.bytes, timer.device)
    ready, without_graphs = _all_ready(contenders, timer, case.launch_bound)
    if without_graphs:
        notes["CUDA graphs"] = without_graphs
    times = interleave(ready, timer, effort)
    dtype = str(case.dtype).removeprefix("torch.")
    return Measurement(case.name, case.op, case.mode, dtype, case.shape, case.bytes, case.sweep, times, notes)


def in_a_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _all_ready(
    contenders: Mapping[str, Contender], timer: Timer, launch_bound: bool
) -> tuple[dict[str, Contender], str | None]:
    """All in graphs or none, so that they are comparable; why none, where the case asked for them."""
    if launch_bound:
        ready = {}
        for name, contender in contenders.items():
            try:
                ready[name] = timer.ready(contender, True)
            except Exception as error:
                without = f"not used, since {name} could not be captured: {in_a_line(error)}"
                break
        else:
            return ready, None
    else:
        without = None
    return {name: timer.ready(contender, False) for name, contender in contenders.items()}, without


def disagreement(got: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor], tolerance: float) -> str | None:
    """What separates `got` from the float64 tensors `expected`, or None where each is within the tolerance."""
    for index, (tensor, reference) in enumerate(zip(got, expected, strict=True)):
        if tensor is None or tensor.shape != reference.shape:
            shape = None if tensor is None else tuple(tensor.shape)
            return f"result {index} is {shape}, not {tuple(reference.shape)}"
        error = ((tensor.detach().double() - reference).abs().max() / reference.abs().max()).item()
        if not error <= tolerance:
            return f"disagrees with float64: result {index} by {error:.1e} of its maximum, allowed {tolerance:.0e}"
    return None


def copy_contender(nbytes: int, device: torch.device) -> Contender:
    """A torch copy that moves `nbytes`, half of them read and half written, between buffers that are already mapped."""
    turns = max(math.ceil(nbytes / COPY_BYTES), 1)
    elements = max(nbytes // (8 * turns), 1)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.zeros(elements, dtype=torch.float32, device=device)

    def call():
        for _ in range(turns):
            target.copy_(source)
        return target

    return Contender(partial(target.copy_, source) if turns == 1 else call)


def interleave(contenders: Mapping[str, Contender], timer: Timer, effort: Effort) -> dict[str, Timing]:
    """Times all contenders in rounds, each round in an order of its own (the same orders in every run)."""
    calls = {}
    for name, contender in contenders.items():
        once = min(timer.sample(contender, 1) for _ in range(WARM_UP))
        calls[name] = min(max(round(SAMPLE_SECONDS / max(once, 1e-9)), 1), timer.max_calls)
    start = time.perf_counter()
    for name, contender in contenders.items():
        timer.sample(contender, calls[name])
    round_seconds = time.perf_counter() - start
    rounds = min(max(int(effort.seconds / round_seconds), effort.min_rounds), effort.max_rounds)

    samples: dict[str, list[float]] = {name: [] for name in contenders}
    late = dict.fromkeys(contenders, 0)
    names, shuffle = list(contenders), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(names)
            for name in names:
                before = timer.late
                samples[name].append(timer.sample(contenders[name], calls[name]))
                late[name] += timer.late - before
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds, calls[name], late[name])
        for name, values in samples.items()
    }
