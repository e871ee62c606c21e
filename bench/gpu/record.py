"""The file of one run: what it ran on, and what each stage has found so far. It is complete after every stage."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

from bigmodel.benchmarks.journal import Progress

SCHEMA = 1
DONE, SKIPPED, PARTIAL, FAILED, RUNNING = "done", "skipped", "partial", "failed", "running"


class Record:
    """<folder>/<date>.json; the earlier one of the same commit is continued."""

    def __init__(self, folder: Path, commit: str, dirty: bool, machine: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.data = self._same(folder, commit, dirty) or (self._free(folder), {"stages": {}})
        self.data = {
            "schema": SCHEMA,
            "date": self.data.get("date", date.today().isoformat()),
            "commit": commit + ("-dirty" if dirty else ""),
            "machine": machine,
            **{key: self.data[key] for key in ("facts", "stages") if key in self.data},
        }

    @staticmethod
    def _same(folder: Path, commit: str, dirty: bool) -> tuple[Path, dict] | None:
        if dirty:
            return None
        for path in sorted(folder.glob("*.json"), reverse=True):
            data = json.loads(path.read_text())
            if data.get("commit") == commit and "stages" in data:
                return path, data
        return None

    @staticmethod
    def _free(folder: Path) -> Path:
        today = date.today().isoformat()
        names = [today, *(f"{today}-{number}" for number in range(2, 100))]
        return next(path for name in names if not (path := folder / f"{name}.json").exists())

    def stage(self, name: str) -> dict:
        """What a stage has found; empty where it has not begun."""
        return self.data["stages"].get(name, {})

    def progress(self, name: str) -> Progress:
        found = self.stage(name)
        return Progress(found.get("plan", []), dict(found.get("done", {})), dict(found.get("errors", {})))

    def update(self, name: str, progress: Progress, **more: object) -> None:
        found = {"plan": progress.plan, "done": progress.done, "errors": progress.errors, "left": progress.left}
        self.data["stages"].setdefault(name, {}).update(found, **more)
        self.save()

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)


def write_journal(path: Path, progress: Progress) -> None:
    """Begins a journal with what is already known."""
    lines = [{"plan": progress.plan}]
    lines += [{"end": item, **found} for item, found in progress.done.items()]
    lines += [{"end": item, "error": text} for item, text in progress.errors.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
