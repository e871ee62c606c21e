"""A plan as files that existing engines run: `write(plan, "slurm" | "skypilot" | "kueue", folder)`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan

TARGETS = ("slurm", "skypilot", "kueue")


def write(plan: Plan, target: str, folder: str | Path) -> list[str]:
    """Writes one file per run and a submit.sh into `folder`; returns what the target cannot express, as sentences.

    Raises:
        ValueError: an unknown target, or a job or pool lacks what the target needs; nothing is written then.
        OSError: the folder cannot be written.
    """
    if target not in TARGETS:
        raise ValueError(f"emit: target is {target!r}; accepted are {', '.join(map(repr, TARGETS))}.")
    from bigmodel.schedule.emit import tasks

    files, remarks = import_module(f"bigmodel.schedule.emit.{target}").render(tasks.of(plan))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    return remarks
