"""Work that survives its process: a list of items, each begun and ended in a file, resumed where it broke off.

The working process plans its items and journals each one, a JSON object a line:

    {"plan": [item, ...]}    all there is to do
    {"begin": item}
    {"end": item, ...}       with what was found, or with "error"

`supervise` starts that process again after a crash or a hang, which become the error of the item that was being worked
on; where the supervising process is gone, the working one ends too, with all that it started. Imports the standard
library alone: it also serves before anything is built.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for the item in hand when the time is up
MAX_STARTS = 25
SUPERVISOR = "BIGMODEL_SUPERVISOR"  # in a worker's environment: the process that it belongs to


@dataclass
class Progress:
    """What a journal says.

    Attributes:
        plan: every item, in order.
        done: what was found, by item.
        errors: why an item has no result, by item.
        running: the item that has begun and not ended.
    """

    plan: list[str] = field(default_factory=list)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    running: str | None = None

    @property
    def left(self) -> list[str]:
        return [item for item in self.plan if item not in self.done and item not in self.errors]


class Journal:
    """A journal to write to; what an earlier process wrote stays, and its items are `known`."""

    def __init__(self, path: Path):
        if SUPERVISOR in os.environ:
            threading.Thread(target=_end_with, args=(int(os.environ[SUPERVISOR]),), daemon=True).start()
        self.path = path
        self.known = read(path)

    def plan(self, items: Iterable[str]) -> list[str]:
        """Writes what there is to do; returns what is left of it."""
        items = list(items)
        self._write({"plan": items})
        return [item for item in items if item not in self.known.done and item not in self.known.errors]

    def begin(self, item: str) -> None:
        self._write({"begin": item})

    def end(self, item: str, **found: Any) -> None:
        self._write({"end": item, **found})

    def error(self, item: str, text: str) -> None:
        self._write({"end": item, "error": text})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> Progress:
    """The progress that a journal records; a line that a dying process cut short is left out."""
    progress = Progress()
    if not path.exists():
        return progress
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "plan" in record:
            progress.plan = record["plan"]
        elif "begin" in record:
            progress.running = record["begin"]
        else:
            item = record.pop("end")
            progress.running = None
            if "error" in record:
                progress.errors[item] = record["error"]
            elif not record.get("cut"):
                progress.done[item] = record
    return progress


def supervise(
    command: Sequence[str],
    path: Path,
    *,
    seconds: float,
    stall: float,
    log: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> str | None:
    """Runs a command that journals into `path`, and again as often as it dies before its plan is done.

    Args:
        command: the process; it is expected to end by itself when it has worked for about `seconds`.
        seconds: after them, and GRACE_SECONDS, it is killed, and the item in hand is left for another time.
        stall: seconds for an item; after them the process is killed, and the item has an error.
        log: where its output goes; None leaves it on this process's own.
        env: its environment.
        tick: called at every look.

    Returns:
        None where each planned item has ended or the time is up; else how the process ended.
    """
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    for _ in range(MAX_STARTS):
        before = read(path)
        # In a process group of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            env={**(os.environ if env is None else env), SUPERVISOR: str(os.getpid())},
            start_new_session=True,
        )
        try:
            verdict = _watch(process, path, deadline, stall, tick)
        finally:
            _kill(process)
        progress = read(path)
        if progress.running is not None:
            ending = {"cut": True} if verdict == "time" else {"error": _ending(process, verdict, stall)}
            with path.open("a") as file:  # on a line of its own, even after one that was cut short
                file.write("\n" + json.dumps({"end": progress.running} | ending) + "\n")
            progress = read(path)
        if verdict == "time" or (process.returncode == 0 and verdict is None):
            return None
        if len(progress.done) + len(progress.errors) == len(before.done) + len(before.errors):
            return _ending(process, verdict, stall)
        if progress.plan and not progress.left:
            return None
    return f"ended {MAX_STARTS} times before its plan was done"


def _watch(
    process: subprocess.Popen, path: Path, deadline: float, stall: float, tick: Callable[[], None]
) -> str | None:
    """None once the process has ended, "time" past the deadline, "stall" where the journal stands still."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        tick()
        now = time.monotonic()
        current = path.stat().st_size if path.exists() else 0
        if current != size:
            size, since = current, now
        if now > deadline:
            return "time"
        if now - since > stall:
            return "stall"
    return None


def _end_with(supervisor: int) -> None:
    """Kills this process's group once the supervisor is gone, who may be its parent's parent, under a tool."""
    while _lives(supervisor):
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie, as one is that was killed and whose own parent has not noticed."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(process: subprocess.Popen, verdict: str | None, stall: float) -> str:
    if verdict == "stall":
        return f"no end within {stall:g} s, stopped"
    code = process.returncode
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"
