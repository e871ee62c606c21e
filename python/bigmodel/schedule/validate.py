"""Refuses what cannot be meant: each failure is one ValueError whose sentence begins with the path of what is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import numpy as np

from bigmodel.schedule.series import MOST_DEVICES, number

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Job, Pool, Problem

# What a file name, a Kubernetes label and a shell word all accept.
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINES = {ord("\n"): None, ord("\t"): None}
MOST_SLOTS = 100_000
MOST_REPLICAS = 10_000
_LEAST_HOURS, _MOST_HOURS = 1 / 3600, 1e6  # of a slot, of the horizon


def fail(path: str, what: str) -> None:
    raise ValueError(f"{path}: {what}.")


def problem(value: Problem) -> None:
    kinds(value, "")
    whole(value.slots, "slots", least=1, most=MOST_SLOTS)
    number(value.slot_hours, "slot_hours", least=_LEAST_HOURS)
    if value.slots * value.slot_hours > _MOST_HOURS:
        fail("slot_hours", f"is {value.slot_hours:g}; a horizon of at most {_MOST_HOURS:g} hours is accepted")
    _clock(value)
    whole(value.now, "now", least=0, most=value.slots - 1)
    for name in ("pools", "jobs"):
        if not getattr(value, name):
            fail(name, "is empty")
        unique(getattr(value, name), name)
    for group, limit in value.quotas.items():
        whole(limit, f"quotas.{group}", least=0)
    if value.budget is not None:
        number(value.budget, "budget")
    owners = {job.owner for job in value.jobs}
    for owner, most in value.budgets.items():
        number(most, f"budgets.{owner}")
        if owner not in owners and not value.now:  # later, his jobs may be over and others may come
            fail(f"budgets.{owner}", f"no job has this owner; owners are {listed(owners)}")
    number(value.stability, "stability")
    _objective(value)
    for index, pool in enumerate(value.pools):
        _pool(value, pool, f"pools[{index}]")
    value.count, value.price, value.carbon  # noqa: B018  reading them checks every value
    for index, job in enumerate(value.jobs):
        _job(value, job, f"jobs[{index}]")
    _precedence(value)


def kinds(item: Any, path: str) -> None:
    """The kinds of all fields that are no numbers, read from their annotations; numbers are checked one by one."""
    from bigmodel.schedule import problem as known

    for field in dataclasses.fields(item):
        here, value, kind = f"{path}.{field.name}" if path else field.name, getattr(item, field.name), str(field.type)
        if kind.endswith(" | None"):
            if value is None:
                continue
            kind = kind.removesuffix(" | None")
        if kind == "str":
            text(value, here, lines=field.name == "command")
        elif kind == "bool" and not isinstance(value, bool):
            fail(here, f"must be true or false, got {value!r}")
        elif kind.startswith("dict") and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            fail(here, f"must be a table, got {value!r}")
        elif kind.startswith("tuple"):
            if not isinstance(value, (list, tuple)):
                fail(here, f"must be a list, got {value!r}")
            of = kind.removeprefix("tuple[").removesuffix(", ...]")
            for index, part in enumerate(value):
                _part(part, f"{here}[{index}]", of, known)
        elif hasattr(known, kind) and dataclasses.is_dataclass(getattr(known, kind)):
            _part(value, here, kind, known)


def _part(value: Any, path: str, kind: str, known: Any) -> None:
    if kind == "str":
        text(value, path)
    elif kind != "int":
        if not isinstance(value, getattr(known, kind)):
            fail(path, f"must be of type {kind}, got {value!r}")
        kinds(value, path)


def text(value: Any, path: str, *, lines: bool = False) -> None:
    """Text that goes into tables, scripts and labels; `lines`: it may have several."""
    if not isinstance(value, str) or not (value.translate(_LINES) if lines else value).isprintable():
        fail(path, f"must be text without control characters, got {value!r}")


def whole(value: Any, path: str, *, least: int = 0, most: int = MOST_DEVICES) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        fail(path, f"must be a whole number, got {value!r}")
    if not least <= value <= most:
        fail(path, f"is {value}; it must be at least {least} and at most {most}")


def choice(value: Any, path: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        fail(path, f"is {value!r}; accepted are {listed(known)}")


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def unique(items: Iterable[Any], path: str) -> None:
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        if not NAME.fullmatch(item.name):
            fail(f"{path}[{index}].name", f"is {item.name!r}; up to 63 letters, digits, '-', '_' and '.' are accepted")
        if item.name in seen:
            fail(f"{path}[{index}].name", f"{item.name!r} is the name of {path}[{seen[item.name]}] too")
        seen[item.name] = index


def _clock(value: Problem) -> None:
    try:
        ZoneInfo(value.tz)
    except Exception:  # zoneinfo raises four unrelated kinds for a bad key
        fail("tz", f"{value.tz!r} is no known IANA time zone")
    try:
        value.clock  # noqa: B018
        value.clock.begins(value.slots)
    except (ValueError, OverflowError) as error:
        fail("start", f"{value.start!r} is no ISO time from which the horizon can be counted ({error})")


def _objective(value: Problem) -> None:
    from bigmodel.schedule.problem import MEASURES

    for index, name in enumerate(value.objective.order):
        choice(name, f"objective.order[{index}]", MEASURES)
    if len(set(value.objective.order)) < len(value.objective.order) or not value.objective.order:
        fail("objective.order", "must name at least one measure, and each once")
    for name, weight in value.objective.weights.items():
        choice(name, "objective.weights", MEASURES)
        number(weight, f"objective.weights.{name}")
    if value.objective.weights and tuple(value.objective.order) != ("cost",):
        fail("objective", "has both an order and weights; give one")


def _pool(value: Problem, pool: Pool, path: str) -> None:
    from bigmodel.schedule.problem import BILLINGS, OWNERSHIPS

    choice(pool.ownership, f"{path}.ownership", OWNERSHIPS)
    choice(pool.billing, f"{path}.billing", BILLINGS)
    for name in ("fixed_cost", "startup_hours", "interruptions_per_hour", "kw"):
        number(getattr(pool, name), f"{path}.{name}")
    number(pool.pue, f"{path}.pue", least=1.0)
    if pool.memory is not None:
        number(pool.memory, f"{path}.memory", above=True)
    if pool.node_size is not None:
        whole(pool.node_size, f"{path}.node_size", least=1)
    if pool.quota_group is not None and pool.quota_group not in value.quotas:
        fail(f"{path}.quota_group", f"{pool.quota_group!r} is not in quotas, which has {listed(value.quotas)}")


def _job(value: Problem, job: Job, path: str) -> None:
    from bigmodel.schedule.problem import UNITS, replica_names

    number(job.work, f"{path}.work", above=True)
    choice(job.unit, f"{path}.unit", UNITS)
    _throughput(value, job, path)
    for name in ("memory", "priority", "checkpoint_every", "restart", "data_gb", "done", "spent"):
        number(getattr(job, name), f"{path}.{name}")
    for name in ("budget", "value"):
        if getattr(job, name) is not None:
            number(getattr(job, name), f"{path}.{name}")
    whole(job.min_run, f"{path}.min_run", least=1)
    whole(job.replicas, f"{path}.replicas", least=1, most=MOST_REPLICAS)
    _window(value, job, path)
    if job.done >= job.work:
        fail(f"{path}.done", f"is {job.done:g} of {job.work:g}: a finished job is not planned")
    if job.mix_pools and (not job.preemptible or job.min_run > 1 or job.restart > 0):
        fail(f"{path}.mix_pools", "a job that mixes pools is preemptible, with min_run 1 and restart 0")
    if job.mix_pools and job.running is not None:
        fail(f"{path}.running", "a job that mixes pools has no run to go on with")
    if job.replicas > 1:
        taken = {other.name for other in value.jobs if other is not job} & set(replica_names(job))
        if taken:
            fail(f"{path}.replicas", f"the copy {min(taken)!r} has the name of another job")
        if job.running or job.done or job.started:
            fail(f"{path}.replicas", "a job that has begun is one copy")
    for name, content in job.env.items():
        if not _VARIABLE.fullmatch(name) or not isinstance(content, str) or "\0" in content:
            fail(f"{path}.env", f"{name!r} must be a variable's name with text as its value")


def _throughput(value: Problem, job: Job, path: str) -> None:
    from bigmodel.schedule.problem import SOURCES

    known = {pool.name: pool for pool in value.pools}
    seen = set()
    if not job.throughput:
        fail(f"{path}.throughput", "is empty: the job can run nowhere")
    for index, point in enumerate(job.throughput):
        here = f"{path}.throughput[{index}]"
        choice(point.pool, f"{here}.pool", known)
        whole(point.devices, f"{here}.devices", least=1)
        number(point.rate, f"{here}.rate", above=True)
        choice(point.source, f"{here}.source", SOURCES)
        if (point.pool, point.devices) in seen:
            fail(here, f"{point.devices} devices of {point.pool!r} have a rate already")
        seen.add((point.pool, point.devices))
        if job.mix_pools and known[point.pool].startup_hours > 0:
            fail(f"{path}.mix_pools", f"pool {point.pool!r} has startup_hours, which a job that mixes pools cannot pay")
    if job.counts is not None:
        for index, devices in enumerate(job.counts):
            whole(devices, f"{path}.counts[{index}]", least=1)
        if not job.counts:
            fail(f"{path}.counts", "is empty: the job can run nowhere")
    if job.running is not None:
        choice(job.running.pool, f"{path}.running.pool", known)
        whole(job.running.devices, f"{path}.running.devices", least=1)
        whole(job.running.slots, f"{path}.running.slots", least=1)
        number(job.running.setup_left, f"{path}.running.setup_left")
        if not job.started:
            fail(f"{path}.started", "must be true for a job that is running")


def _window(value: Problem, job: Job, path: str) -> None:
    for name in ("release", "deadline"):
        when = getattr(job, name)
        if when is None and name == "deadline":
            continue
        if isinstance(when, bool) or not isinstance(when, (int, np.integer, str)):
            fail(f"{path}.{name}", f"must be a slot number or an ISO time, got {when!r}")
        try:
            slot = getattr(value.clock, name)(when)
        except (ValueError, OverflowError) as error:
            fail(f"{path}.{name}", f"{when!r} is no ISO time ({error})")
        if name == "release" and not 0 <= slot < value.slots:
            fail(f"{path}.release", f"is slot {slot}; the horizon has the slots 0 to {value.slots - 1}")
    if job.soft and job.deadline is None:
        fail(f"{path}.soft", "needs a deadline")
    if job.deadline is not None and not job.soft:
        first, last = value.clock.release(job.release), value.clock.deadline(job.deadline)
        if last <= first:
            fail(f"{path}.deadline", f"slot {last} leaves no slot after the release in slot {first}")


def _precedence(value: Problem) -> None:
    index = {job.name: i for i, job in enumerate(value.jobs)}
    waits = {}
    for i, job in enumerate(value.jobs):
        for k, before in enumerate(job.after):
            choice(before, f"jobs[{i}].after[{k}]", index)
        waits[job.name] = set(job.after)
    while waits:
        free = {name for name, before in waits.items() if not before & set(waits)}
        if not free:
            first, *others = _cycle(waits, index)
            through = f" through {listed(others)}" if others else ""
            fail(f"jobs[{index[first]}].after", f"{first!r} waits for itself{through}")
        waits = {name: before for name, before in waits.items() if name not in free}


def _cycle(waits: dict[str, set[str]], index: dict[str, int]) -> list[str]:
    """Jobs that wait for each other in a ring, where each of `waits` waits for another of them."""
    path: list[str] = []
    name = min(waits, key=index.__getitem__)
    while name not in path:
        path.append(name)
        name = min(waits[name] & set(waits), key=index.__getitem__)
    ring = path[path.index(name) :]
    first = ring.index(min(ring, key=index.__getitem__))
    return ring[first:] + ring[:first]
