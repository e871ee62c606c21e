"""The stages: each a process, or some, that journals its items and is started again after a crash."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.benchmarks.journal import Progress, read, supervise
from gpu import machine
from gpu.machine import ROOT, Machine
from gpu.record import write_journal

TOOLS = ("memcheck", "racecheck", "initcheck")
MOST_SHARDS = 4
# The longest that one item may take: a build, a test that compiles, a case that compiles, a kernel under a sanitizer.
STALL = {"build": 400.0, "test": 120.0, "bench": 90.0, "sanitize": 120.0, "model": 120.0}


# What else would be kept in the home directory, which may be read-only: compiled kernels, a font list.
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "MPLCONFIGDIR": "matplotlib"}


class Skipped(Exception):
    """Why a stage cannot run on this machine, whose lack is no failure."""


@dataclass
class Context:
    """What a stage runs with: the machine, the folder of its logs and journals, and pytest's arguments, `tests`."""

    machine: Machine
    work: Path
    tests: list[str]
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def site(self) -> Path:
        return self.work / "site"

    def environment(self, **more: str) -> dict[str, str]:
        """The package built here first, then the helpers of this folder, then what the user has."""
        path = [str(self.site), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        caches = {name: str(self.work / "cache" / folder) for name, folder in CACHES.items()}
        ours = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
        return caches | os.environ | ours | more


class Work:
    """Journals of one stage, several where it works side by side; `progress` merges what they hold.

    `known` is what an earlier run found, `tools` what sanitizers did, by tool. `tick` is called at every look at a
    running process, in any thread, and may raise to stop the stage.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        known: Progress,
        tick: Callable[[], None],
        tools: Mapping[str, dict[str, Any]] | None = None,
    ):
        self.context, self.name, self.known, self.tools = context, name, known, dict(tools or {})
        self._tick, self._lock = tick, threading.Lock()
        self.journals: list[Path] = []

    def supervise(
        self, command: list[str], seconds: float, env: dict[str, str], journal: str, stall: float
    ) -> str | None:
        """Runs a command that ends in the option for its journal, or finds that in BIGMODEL_JOURNAL."""
        path = self.journal(journal)
        write_journal(path, Progress([], self.known.done, self.known.errors))
        self.journals.append(path)
        env = env | {"BIGMODEL_JOURNAL": str(path)}
        command = [str(path) if word == "JOURNAL" else word for word in command]
        with self.log.open("ab") as log:
            return supervise(command, path, seconds=seconds, stall=stall, log=log, env=env, tick=self.tick)

    def journal(self, name: str) -> Path:
        return self.context.work / f"{self.name}-{name}.jsonl"

    @property
    def log(self) -> Path:
        return self.context.work / f"{self.name}.log"

    def tick(self) -> None:
        with self._lock:
            self._tick()

    def progress(self) -> Progress:
        found = [read(path) for path in self.journals]
        plan = list(dict.fromkeys(item for each in found for item in each.plan)) or self.known.plan
        done = {item: value for each in found for item, value in each.done.items()}
        errors = {item: value for each in found for item, value in each.errors.items()}
        return Progress(plan, done, errors)


def build(work: Work, seconds: float) -> str | None:
    context = work.context
    work.known = Progress()  # a record does not hold what was installed
    path = [str(ROOT / "bench"), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    env = context.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-m", "gpu.build", "--device", context.machine.device, "--site", str(context.site)]
    command += ["--architecture", context.machine.architecture, "--journal", "JOURNAL"]
    return work.supervise(command, seconds, env, "build", STALL["build"])


def cuda_tests() -> list[str]:
    """pytest's arguments for every test marked cuda; collecting the other files would take most of its start."""
    marked = re.compile(r"\bmark\.cuda\b|def test_\w+\([^)]*\bdevice\b")  # itself, or by the fixture `device`
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text())]
    # First what only a device can answer: tests/cuda_host runs the ops' cases everywhere.
    files.sort(key=lambda path: (not path.name.startswith("test_cuda"), path))
    return [*map(str, files), "-m", "cuda"]


def test(work: Work, seconds: float) -> str | None:
    context = work.context
    if "pytest" in context.machine.missing:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pytest_journal", "-q", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", *context.tests]
    shards = max(min(MOST_SHARDS, len(os.sched_getaffinity(0)) // 2), 1)

    def run(shard: int) -> str | None:
        env = context.environment(BIGMODEL_SHARD=f"{shard}/{shards}")
        return work.supervise(command, seconds, env, f"{shard}", STALL["test"])

    with ThreadPoolExecutor(shards) as pool:
        endings = list(pool.map(run, range(shards)))
    # pytest's status 1 says that tests failed, which the journals tell; 5 that there are none for this shard.
    return next((ending for ending in endings if ending and not re.search(r"status [15]$", ending)), None)


def bench(work: Work, seconds: float) -> str | None:
    group, device = work.name.removeprefix("bench-"), work.context.machine.device
    command = [sys.executable, "-m", "bigmodel.benchmarks", group, "--device", device, "--pages", "default pages"]
    command += ["--sweep"] if device == "cuda" else ["--quick"]
    command += ["--seconds", f"{seconds:.1f}", "--journal", "JOURNAL"]
    return work.supervise(command, seconds, work.context.environment(), "cases", STALL["bench"])


def model(work: Work, seconds: float) -> str | None:
    context = work.context
    if "transformers" in context.machine.missing:
        raise Skipped("transformers is not installed")
    command = [sys.executable, "-m", "bigmodel.benchmarks.model", "--device", context.machine.device]
    command += ["--seconds", f"{seconds:.1f}", "--journal", "JOURNAL"]
    env = context.environment(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    return work.supervise(command, seconds, env, "turns", STALL["model"])


def sanitize(work: Work, seconds: float) -> str | None:
    context, tool_path = work.context, machine.sanitizer()
    if tool_path is None:
        raise Skipped("compute-sanitizer is neither on PATH nor beside nvcc")
    # Every allocation its own, so that an access beyond it is seen.
    env = context.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    until = time.monotonic() + seconds  # its start, long under a tool, counts; a tool that is killed has no summary

    def run(tool: str) -> str | None:
        port = 49152 + 100 * TOOLS.index(tool)  # of the default ones, all three would begin at the first
        for old in context.work.glob(f"{tool}-*.log"):
            old.unlink()
        command = [tool_path, "--tool", tool, "--print-limit", "30", "--port", f"{port}"]
        if tool == "memcheck":  # calls of the API that fail are torch's own, and it handles them
            command += ["--report-api-errors", "no"]
        if tool != "initcheck":  # which must see torch's kernels too: what they write is what ours read
            command += ["--kernel-name", "kns=bigmodel"]
        command += ["--log-file", str(context.work / f"{tool}-%p.log"), sys.executable, "-m", "gpu.exercise"]
        command += ["--tool", tool, "--device", context.machine.device, "--until", f"{until:.1f}"]
        return work.supervise([*command, "--journal", "JOURNAL"], seconds, env, tool, STALL["sanitize"])

    # Side by side: most of a tool's time is the start of a process that it watches.
    endings: dict[str, str | None] = {}
    refused: dict[str, dict[str, Any]] = {}
    try:
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            endings.update(zip(TOOLS, pool.map(run, TOOLS), strict=True))
    finally:  # what a tool found stays with the items that it watched, also where the run is stopped
        found = sanitizer_findings(context.work)
        for tool, ending in endings.items():
            words = found.get(tool, {}).get("words", [])
            why = next((line for line in words if "not supported" in line), None)
            if ending and why and not read(work.journal(tool)).plan:  # it could not even begin
                refused[tool] = {"errors": 0, "words": [], "skipped": why}
                del found[tool]
        work.tools |= {tool: _together(work.tools.get(tool), each) for tool, each in found.items()}
    if len(refused) == len(TOOLS):
        raise Skipped("compute-sanitizer cannot watch this device: " + refused[TOOLS[0]]["skipped"])
    work.tools = refused | work.tools
    return next((ending for tool, ending in endings.items() if ending and tool not in refused), None)


def _together(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """A tool's findings in a run that was cut off, which has no summary, and in the one that went on."""
    if before is None:
        return now
    known = before["errors"] is not None or not before["words"]
    errors = (before["errors"] or 0) + now["errors"] if known and now["errors"] is not None else None
    return {"errors": errors, "words": before["words"] + now["words"]}


def sanitizer_findings(folder: Path) -> dict[str, dict[str, Any]]:
    """What compute-sanitizer wrote, by tool: its errors, or None where it never came to its summary, and its words."""
    found = {}
    for tool in TOOLS:
        texts = [path.read_text(errors="replace") for path in sorted(folder.glob(f"{tool}-*.log"))]
        if not texts:
            continue
        lines = [line.removeprefix("=========").strip() for text in texts for line in text.splitlines()]
        counts = [re.search(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)", text) for text in texts]
        errors = None if None in counts else sum(int(count[1]) for count in counts if count)
        words = [
            line for line in lines if line and not line.startswith(("COMPUTE-SANITIZER", "Saved host", "Host Frame"))
        ]
        found[tool] = {"errors": errors, "words": words[:60]}
    return found


STAGES: dict[str, Callable[[Work, float], str | None]] = {
    "build": build,
    "test": test,
    "bench-norm": bench,
    "bench-softmax": bench,
    "bench-adam": bench,
    "sanitize": sanitize,
    "model": model,
}
# What part of the time that is left a stage may take beside those after it; what it leaves goes to them.
SHARE = {"build": 30, "test": 22, "bench-norm": 20, "bench-softmax": 12, "bench-adam": 10, "sanitize": 12, "model": 10}
