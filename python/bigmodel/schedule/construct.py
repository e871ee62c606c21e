"""The first incumbent: every job rounded to its cheapest schedule at the relaxation's prices, and repaired.

Jobs are put in one by one. One that finds no room takes it from others, which are put in again later; each conflict
makes its slots dearer, so that jobs with a choice learn to stay away. Source of the repair: negotiated congestion,
McMurchie and Ebeling, PathFinder (1995).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np

from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.instance import Instance
from bigmodel.schedule.state import State, by_slot, cheapest

_EJECTIONS_PER_JOB = 12


def construct(
    inst: Instance,
    prices: Prices,
    share: float = 1.0,
    tick: Callable[[], None] = lambda: None,
    state: State | None = None,
) -> State:
    """`state`, or an empty one, with as many more jobs as could be placed; `share` of capacity's price is charged."""
    state = State(inst) if state is None else state
    depth = _depth(inst)
    history = np.zeros_like(inst.unit)
    shared = prices.shared(inst) * share
    queue: list[tuple[int, float, int]] = []

    def push(j: int) -> None:
        heappush(queue, (depth[j], _slack(inst, j), j))

    for j in range(len(inst.jobs)):
        push(j)
    left = _EJECTIONS_PER_JOB * len(inst.jobs)
    while queue:
        tick()
        j = heappop(queue)[2]
        if j in state.schedules or any(b not in state.schedules for b in inst.jobs[j].after):
            continue
        unit = prices.unit(inst, j, shared) + history
        if insert(state, j, unit) or np.isfinite(inst.jobs[j].drop):
            continue
        if left <= 0:
            continue
        victims = _squeeze(state, j, unit, history)
        left -= 1 + len(victims)
        for victim in victims:
            push(victim)
        for waiting in range(len(inst.jobs)):
            if waiting not in state.schedules and depth[waiting] > depth[j]:
                push(waiting)
    # A job taken out for another may be dropped for good: what follows it cannot run then.
    for j in sorted(state.schedules, key=lambda j: depth[j]):
        if any(before not in state.schedules for before in inst.jobs[j].after):
            state.remove(j)
    return state


def rounded(inst: Instance, prices: Prices, held: np.ndarray, tick: Callable[[], None] = lambda: None) -> State:
    """A plan near a relaxation's: what it gives a job is kept for that job until its turn comes.

    held: devices of each job, (jobs, pools, slots), rounded to the largest count that is at most half a device more;
    of a gang, in its largest pool of a slot only. For jobs whose slots nothing ties together.
    """
    kept = np.zeros(held.shape, dtype=int)
    for data in inst.jobs:
        j = data.index
        for p in np.unique(data.pool):
            counts = np.append(0, np.sort(data.devices[data.pool == p]))
            whole = counts[np.searchsorted(counts, held[j, p] + 0.5, side="right") - 1]
            kept[j, p] = whole if data.job.mix_pools else np.where(held[j].argmax(axis=0) == p, whole, 0)
    state, shared, waiting = State(inst), prices.shared(inst) * 0.5, kept.sum(axis=0)
    depth = _depth(inst)
    for j in sorted(range(len(inst.jobs)), key=lambda j: (depth[j], _slack(inst, j))):
        tick()
        waiting -= kept[j]
        if all(before in state.schedules for before in inst.jobs[j].after):
            insert(state, j, prices.unit(inst, j, shared), _beside(state, waiting))
    return construct(inst, prices, 0.5, tick, state)


def _beside(state: State, waiting: np.ndarray) -> np.ndarray:
    """Devices left beside those that wait for their jobs, (pools, slots)."""
    free = state.free() - waiting
    for (members, _), room in zip(state.inst.groups, state.quota, strict=True):
        pools = list(members)
        free[pools] = np.minimum(free[pools], room - waiting[pools].sum(axis=0))
    return np.maximum(free, 0)


def insert(state: State, j: int, unit: np.ndarray, free: np.ndarray | None = None) -> bool:
    """Puts job j where it is cheapest at `unit` within `free`, all that is left if None; a droppable one only where it
    earns its value."""
    inst, data = state.inst, state.inst.jobs[j]
    first, last = state.window(j)
    free = state.free() if free is None else free
    schedule = cheapest(inst, data, unit, free, first=first, last=last, quota=state.quota)
    if not schedule.use or (np.isfinite(data.drop) and schedule.cost > data.drop):
        return False
    state.put(j, schedule.use)
    return True


def _squeeze(state: State, j: int, unit: np.ndarray, history: np.ndarray) -> list[int]:
    """Puts job j in as if it were alone, taking out what stands in its way; the jobs taken out."""
    inst, data = state.inst, state.inst.jobs[j]
    free = inst.free()
    first, last = state.window(j)
    scale = float(inst.unit[inst.count > 0].mean()) if (inst.count > 0).any() else 1.0
    crowded = unit + (scale + history) * (1.0 - state.free() / np.maximum(free, 1))
    schedule = cheapest(inst, data, crowded, free, first=first, last=last)
    out: list[int] = []
    if not schedule.use:
        schedule = cheapest(inst, data, crowded, free)
        if not schedule.use:
            return []
        start, finish = schedule.use[0][0], schedule.use[-1][0] + 1
        out += [b for b in data.after if b in state.schedules and state.finish(b) > start]
        out += [a for a in state.after[j] if a in state.schedules and state.start(a) < finish]
        for other in out:
            state.remove(other)
    taken = by_slot(schedule.use)
    for slot, p, _ in schedule.use:
        while state.short(taken[slot], p, slot):
            history[p, slot] += 0.3 * scale
            holders = [i for i, held in state.schedules.items() if _uses(inst, held.use, p, slot)]
            if not holders:
                return out
            victim = max(holders, key=lambda i: (_slack(inst, i), -i))
            state.remove(victim)
            out.append(victim)
    state.put(j, schedule.use)
    return out


def _uses(inst: Instance, use, p: int, slot: int) -> bool:
    """Whether a schedule holds devices in this slot on the pool or on one that shares a quota with it."""
    sharing = {p}.union(*(members for members, _ in inst.groups if p in members))
    return any(s == slot and q in sharing for s, q, _ in use)


def _slack(inst: Instance, j: int) -> float:
    """Window over the time that the job takes at its fastest: the small ones have little choice."""
    data = inst.jobs[j]
    if not len(data.rate):
        return 0.0
    return (data.last - data.first) * inst.h / (data.work / data.rate.max())


def _depth(inst: Instance) -> list[int]:
    depth = [0] * len(inst.jobs)
    for _ in inst.jobs:
        for data in inst.jobs:
            depth[data.index] = max([0, *(depth[before] + 1 for before in data.after)])
    return depth
