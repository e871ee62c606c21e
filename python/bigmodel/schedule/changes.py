"""What became known since a plan was made: as objects, or as tables like a problem's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bigmodel.schedule import files, validate
from bigmodel.schedule.problem import Job, PerSlot, Rate, When

_LISTS = ("failed", "cancelled", "gone", "jobs")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is known at `now` that the plan did not know.

    progress: work done since the job began, by job; without it, what was planned. throughput: points that replace a
    job's own on the same pools. failed: jobs that stopped (without progress, half a checkpoint's interval is lost).
    cancelled: jobs that end; what follows them no longer waits. gone: pools without devices from now on. prices,
    counts: per-slot values of pools. deadlines: by job; None takes one away. jobs: new ones. Points and jobs may be
    tables as in a problem's file.

    Raises:
        ValueError: a value of the wrong kind, as one sentence that begins with its path.
    """

    progress: Mapping[str, float] = field(default_factory=dict)
    throughput: Mapping[str, Sequence[Rate]] = field(default_factory=dict)
    failed: Sequence[str] = ()
    cancelled: Sequence[str] = ()
    gone: Sequence[str] = ()
    prices: Mapping[str, PerSlot] = field(default_factory=dict)
    counts: Mapping[str, PerSlot] = field(default_factory=dict)
    deadlines: Mapping[str, When | None] = field(default_factory=dict)
    jobs: Sequence[Job] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _read(each.name, getattr(self, each.name), f"replan: changes.{each.name}")
            object.__setattr__(self, each.name, value)

    @classmethod
    def of(cls, given: Changes | Mapping[str, Any] | None) -> Changes:
        """Changes from a table of their fields; None is no change."""
        if isinstance(given, Changes):
            return given
        if given is not None and not isinstance(given, Mapping):
            validate.fail("replan: changes", f"must be a table or Changes, got {given!r}")
        for name in given or {}:
            validate.choice(name, "replan: changes", [each.name for each in fields(cls)])
        return cls(**given or {})


def load(path: str | Path) -> Changes:
    """Reads changes from a .toml or .json file; relative CSV paths in it start at its folder.

    Raises:
        OSError: the file cannot be read. ValueError: as Changes.
    """
    path = Path(path)
    changes = Changes.of(files.read(path, "a file of changes"))
    for table in (changes.prices, changes.counts):
        for source in table.values():
            if isinstance(source, dict) and isinstance(source.get("csv"), str):
                source["csv"] = str(path.parent.absolute() / source["csv"])
    return changes


def _read(name: str, value: Any, path: str) -> Any:
    if name in _LISTS:
        items = _listed(value, path)
        if name == "jobs":
            return tuple(_built(Job, job, f"{path}[{index}]") for index, job in enumerate(items))
        for index, item in enumerate(items):
            validate.text(item, f"{path}[{index}]")
        return tuple(items)
    if not isinstance(value, Mapping):
        validate.fail(path, f"must be a table, got {value!r}")
    if name == "throughput":
        return {job: _points(points, f"{path}.{job}") for job, points in value.items()}
    if name == "progress":
        return {job: validate.number(work, f"{path}.{job}") for job, work in value.items()}
    return files.iso(dict(value))


def _points(value: Any, path: str) -> tuple[Rate, ...]:
    return tuple(_built(Rate, point, f"{path}[{index}]") for index, point in enumerate(_listed(value, path)))


def _listed(value: Any, path: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple, set)):
        validate.fail(path, f"must be a list, got {value!r}")
    return list(value)


def _built(kind: type, value: Any, path: str) -> Any:
    built = value if isinstance(value, kind) else files.build(kind, value, path)
    validate.kinds(built, path)
    return built
