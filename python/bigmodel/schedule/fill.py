"""A job that mixes pools, at given prices: devices are taken where work is cheapest, until the work is done.

Per pool, the lower convex hull of devices over rate gives steps of falling efficiency; over all pools and slots the
steps are taken in order of price per work. The last step taken in part is the relaxation; whole, it is a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigmodel.schedule.instance import JobData
from bigmodel.schedule.path import Schedule

Quotas = Sequence[tuple[tuple[int, ...], np.ndarray]]

_FEW = 64  # points from which numpy is quicker than a loop over them


def hull(devices: np.ndarray, rate: np.ndarray) -> list[tuple[int, float]]:
    """(devices, rate) points on the concave majorant of a pool's rates, the origin first. devices: rising."""
    n, r = np.append(0, devices), np.append(0.0, rate)
    while len(n) > _FEW:  # what lies on or below the line between its neighbours is no corner
        slope = np.diff(r) / np.diff(n)
        corner = np.concatenate([[True], slope[:-1] > slope[1:], [True]])
        if corner.mean() > 0.75:  # few go: the loop below is quicker than many passes
            break
        n, r = n[corner], r[corner]
    points, slopes = [(0, 0.0)], [np.inf]  # of the edge that ends in each point
    for x, y in zip(n[1:].tolist(), r[1:].tolist(), strict=True):
        while (steep := (y - points[-1][1]) / (x - points[-1][0])) >= slopes[-1]:
            points.pop()
            slopes.pop()
        points.append((x, y))
        slopes.append(steep)
    while len(points) > 1 and points[-1][1] <= points[-2][1]:
        points.pop()
    return points


def cheapest(
    data: JobData, unit, free, h: float, *, optimistic: bool, first: int, last: int, quotas: Quotas = ()
) -> Schedule:
    """The relaxation's value if `optimistic` (its use is rounded up), else a schedule in whole devices.

    quotas: pools that share one, and what is left of it by slot; the relaxation does without them.
    """
    best = Schedule(np.inf, ())
    ends = [last]
    if data.late[last] > data.late[first]:
        ends = [e for e in range(first + 1, last + 1) if e == last or data.late[e] < data.late[e + 1]]
    for end in ends:
        found = _fill(data, unit, free, h, first, end, None if optimistic else quotas)
        if found.use:
            late = data.late[end if optimistic else found.use[-1][0] + 1]
            found = Schedule(found.cost + late, found.use)
        if found.cost < best.cost:
            best = found
    return best


def _fill(data: JobData, unit, free, h: float, first: int, last: int, quotas: Quotas | None) -> Schedule:
    """quotas: None for the relaxation."""
    steps = _steps(data, unit, free, h, first, last)
    total = sum(step[1].sum() for step in steps)
    if not steps or total < data.work * (1 - 1e-9):
        return Schedule(np.inf, ())
    price, work, slot, pool, devices = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(price, kind="stable")
    if quotas:
        order = _within(data, quotas, order, work, slot, pool, devices, h)
    done = np.cumsum(work[order])
    taken = int(np.searchsorted(done, data.work * (1 - 1e-9))) + 1
    if taken > len(order):
        return Schedule(np.inf, ())
    chosen = order[:taken]
    over = done[taken - 1] - data.work
    cost = float((price[chosen] * work[chosen]).sum() - price[chosen[-1]] * max(0.0, over))
    table: dict[tuple[int, int], int] = {}
    for i in chosen:
        key = (int(slot[i]), int(pool[i]))
        table[key] = table.get(key, 0) + int(devices[i])
    if quotas is not None:
        _shave(data, table, unit, h)
        cost = sum(unit[p, s] * n * h for (s, p), n in table.items())
    return Schedule(cost, tuple((s, p, n) for (s, p), n in sorted(table.items())))


def _within(data: JobData, quotas: Quotas, order, work, slot, pool, devices, h: float) -> np.ndarray:
    """The steps for which quotas have room, in order; the first of a pool and slot that has none is cut to the largest
    count that has, in `work` and `devices`, and those after it are left out."""
    left = [(members, room.copy()) for members, room in quotas]
    held: dict[tuple[int, int], int] = {}
    full: set[tuple[int, int]] = set()
    fits = []
    for i in order:
        p, s, n = int(pool[i]), int(slot[i]), int(devices[i])
        if (p, s) in full:
            continue
        rooms = [room for members, room in left if p in members]
        before = held.get((p, s), 0)
        most = min([n, *(int(room[s]) for room in rooms)])
        if n > most:
            full.add((p, s))
            n = max([0, *(count - before for q, count in data.known if q == p and count - before <= most)])
            if not n:
                continue
            devices[i] = n
            work[i] = (data.known[p, before + n][0] - (data.known[p, before][0] if before else 0.0)) * h
        for room in rooms:
            room[s] -= n
        held[p, s] = before + n
        fits.append(i)
    return np.array(fits, dtype=int)


def _steps(data: JobData, unit, free, h: float, first: int, last: int) -> list[tuple[np.ndarray, ...]]:
    """(price per work, work, slot, pool, devices) of every step of every hull."""
    steps: list[tuple[np.ndarray, ...]] = []
    slots = np.arange(first, last)
    for p in np.unique(data.pool):
        mine = data.pool == p
        for most in np.unique(np.minimum(free[p, slots], data.devices[mine].max())):
            fits = mine & (data.devices <= most)
            here = slots[np.minimum(free[p, slots], data.devices[mine].max()) == most]
            points = hull(data.devices[fits], data.rate[fits])
            for (n0, r0), (n1, r1) in zip(points, points[1:], strict=False):
                work = np.full(len(here), (r1 - r0) * h)
                price = unit[p, here] * (n1 - n0) * h / work
                steps.append((price, work, here, np.full(len(here), p), np.full(len(here), n1 - n0)))
    return steps


def _shave(data: JobData, table: dict[tuple[int, int], int], unit, h: float) -> None:
    """Gives back devices, the dearest first, while the work is still done."""
    known = data.known
    spare = sum(known[p, n][0] for (_, p), n in table.items()) - data.work / h
    for s, p in sorted(table, key=lambda key: (-unit[key[1], key[0]], key)):
        n = table[s, p]
        while n and (n == 1 or (p, n - 1) in known):
            given = known[p, n][0] - (known[p, n - 1][0] if n > 1 else 0.0)
            if spare < given:
                break
            spare -= given
            n -= 1
        if n:
            table[s, p] = n
        else:
            del table[s, p]
