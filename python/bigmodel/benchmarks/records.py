"""Records of long measurements in one JSON file, written as they come, so that a run goes on where another stopped.

Each record names its commit and whether the machine was shared while it was made.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHARED = 0.1  # cores that others use on average from which the machine counts as shared

Record = dict[str, Any]


class Records:
    """path: the file, read if it is there; None keeps records in memory alone. commit: None where it is unknown.

    stop_after: seconds after which `done` is true.
    """

    def __init__(self, path: Path | None, commit: str | None, stop_after: float = float("inf")):
        import scipy

        self.path, self.commit = path, commit
        self._end = time.monotonic() + stop_after
        self.content: dict[str, Any] = {}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
        self.content["machine"] = {
            "python": platform.python_version(), "scipy": scipy.__version__, "cores": os.cpu_count(),
        }  # fmt: skip

    def done(self) -> bool:
        return time.monotonic() > self._end

    def of(self, part: str) -> list[Record]:
        """The part's records of this commit."""
        return [record for record in self.content.get(part, []) if record.get("commit") == self.commit]

    def measure(
        self, part: str, key: Record, make: Callable[[], Record], finish: Callable[[], None] = lambda: None
    ) -> Record:
        """The record of this commit with these values of `key`, or else what `make` returns, written down.

        finish: ends the child processes of `make`, whose time is theirs only then.
        """
        for record in self.of(part):
            if all(record.get(name) == value for name, value in key.items()):
                return record
        before = _busy()
        found = make()
        finish()
        record = {**key, **found, "commit": self.commit, **_others(before, _busy())}
        self.content.setdefault(part, []).append(record)
        if self.path is not None:
            # Whole or not at all: a run that is stopped while it writes loses no record.
            half = self.path.with_name(self.path.name + ".part")
            half.write_text(json.dumps(self.content, indent=1) + "\n")
            half.replace(self.path)
        return record


def _busy() -> tuple[float, float, float] | None:
    """Seconds of (the clock, the whole machine, this process and its ended children); None where unknown."""
    try:
        user, nice, system, idle, wait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    machine = (user + nice + system + sum(rest[:2])) / os.sysconf("SC_CLK_TCK")
    mine = sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return time.monotonic(), machine, mine


def _others(before: tuple | None, after: tuple | None) -> Record:
    """others: cores that other processes used meanwhile, on average."""
    if before is None or after is None:
        return {"others": None, "shared": None}
    wall, machine, mine = (end - begin for begin, end in zip(before, after, strict=True))
    others = max(0.0, machine - mine) / max(wall, 1e-9)
    return {"others": round(others, 2), "shared": others > _SHARED}
