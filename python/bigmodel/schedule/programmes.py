"""The programmes in whole numbers of a plan's neighbourhoods, and how their answers are read as plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.columns import Columns
from bigmodel.schedule.instance import Instance
from bigmodel.schedule.model import Model
from bigmodel.schedule.state import State

_PER_JOB = 25  # columns of a recombination


@dataclass(frozen=True)
class Programme:
    """arrays: as mip takes them. gap: relative, at which it is solved. read: the plan that a solution stands for."""

    arrays: dict[str, Any]
    gap: float
    read: Callable[[np.ndarray], State | None]


def model(inst: Instance, members: Iterable[int], state: State) -> Model:
    """The model of some jobs in what a plan without them leaves free."""
    members = list(members)
    free = {"pool": np.maximum(state.left, 0), "quota": state.quota}
    room = [limit.most - state.usage[row].sum() for row, limit in enumerate(inst.stage.limits)]
    return Model(inst, members, free, {j: state.window(j) for j in members}, room)


def recombination(columns: Columns, prices: Prices, value: float, spread: float, gap: float) -> Programme | None:
    """The master in whole numbers over the columns of least reduced cost.

    spread: between the best plan's value and the bound; a column dearer by more is in no better plan.
    """
    if not columns.job or not np.isfinite(value):  # every job is dropped, or there is no plan yet
        return None
    from scipy.sparse import vstack

    inst, slack = columns.inst, columns.slack(prices)
    useful = np.flatnonzero(slack <= spread)
    keep = np.sort(useful[np.argsort(slack[useful], kind="stable")[: _PER_JOB * len(inst.jobs)]])
    master = columns.master(np.full(len(inst.jobs), 20 * max(abs(value), 1.0)), keep)
    arrays = {
        "c": master["c"],
        "rows": (
            vstack([master["A_eq"], master["A_ub"]]).tocsr(),
            np.concatenate([master["b_eq"], np.full(len(master["b_ub"]), -np.inf)]),
            np.concatenate([master["b_eq"], master["b_ub"]]),
        ),
        "bounds": (np.zeros(len(master["c"])), np.ones(len(master["c"]))),
        "integrality": np.ones(len(master["c"])),
    }

    def read(x: np.ndarray) -> State | None:
        return _ordered(inst, {columns.job[i]: columns.use[i] for i in keep[x[: len(keep)] > 0.5]})

    return Programme(arrays, gap, read)


def few_jobs(inst: Instance, state: State, rng: np.random.Generator, most: int) -> Programme | None:
    """A few jobs freed at once, of about `most` columns together, the rest fixed; None if one has no window left."""
    seed = int(rng.integers(len(inst.jobs)))
    near = [d.index for d in inst.jobs if d.last > inst.jobs[seed].first and d.first < inst.jobs[seed].last]
    members: list[int] = []
    size = 0
    for j in [seed, *rng.permutation(near).tolist()]:
        data = inst.jobs[j]
        size += (data.last - data.first) * max(1, len(data.pool)) * (3 if data.switches else 1)
        if size > most and members:
            break
        if j not in members:
            members.append(j)
    trial = State.holding(inst, {j: schedule.use for j, schedule in state.schedules.items()})
    for j in members:
        if j in trial.schedules:
            trial.remove(j)
    if any(trial.window(j)[0] >= trial.window(j)[1] for j in members):
        return None
    freed = model(inst, members, trial)

    def read(x: np.ndarray) -> State | None:
        for j, use in freed.read(x).items():
            if use:
                trial.put(j, use)
        # The model knows no job that follows a freed one and is not freed itself.
        left = (before for j in trial.schedules for before in inst.jobs[j].after if before not in trial.schedules)
        return trial if next(left, None) is None else None

    return Programme(freed.program(), 0.0, read)


def _ordered(inst: Instance, schedules: dict[int, tuple]) -> State | None:
    """The master knows no precedence: a choice that breaks it is refused."""
    state = State.holding(inst, schedules)
    for j in schedules:
        for before in inst.jobs[j].after:
            if before not in schedules or state.finish(before) > state.start(j):
                return None
    return state
