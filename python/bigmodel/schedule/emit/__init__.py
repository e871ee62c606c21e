"""A plan as files that existing engines run: `write(plan, "slurm" | "skypilot" | "kueue", folder)`."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan
    from bigmodel.schedule.problem import Problem

TARGETS = ("slurm", "skypilot", "kueue")
_WRITTEN = re.compile(r"submit\.sh|.+\.run\d+.*\.(sbatch|yaml)")


def write(plan: Plan, target: str, folder: str | Path) -> list[str]:
    """Writes one file per run and a submit.sh into `folder`; returns what the target cannot express, as sentences.

    Raises:
        ValueError, OSError: as `check`; nothing is written then. OSError: writing fails.
    """
    from bigmodel.schedule.emit import tasks

    check(plan.problem, target, folder)
    files, remarks = _module(target).render(tasks.of(plan))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    return remarks


def check(problem: Problem, target: str, folder: str | Path) -> None:
    """Whether any plan of `problem` can be written for `target`, known before there is one.

    Raises:
        ValueError: an unknown target, or a job, or a pool that a job may use, lacks what the target needs.
        OSError: `folder` cannot be written, or holds the files of an earlier plan, which a submit.sh may still read.
    """
    if target not in TARGETS:
        raise ValueError(f"emit: target is {target!r}; accepted are {', '.join(map(repr, TARGETS))}.")
    for job in problem.jobs:
        if not job.command.strip():
            raise ValueError(f"job {job.name}: command is empty, so it cannot be emitted.")
    used = {point.pool for job in problem.jobs for point in job.throughput}
    _module(target).check(problem, [pool for pool in problem.pools if pool.name in used])
    _check_folder(Path(folder))


def _module(target: str) -> Any:
    return import_module(f"bigmodel.schedule.emit.{target}")


def _check_folder(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written.")
    old = sorted(path.name for path in folder.glob("*") if _WRITTEN.fullmatch(path.name))
    if old:
        raise FileExistsError(f"{folder} holds files of an earlier plan, such as {old[-1]}; name another folder.")
