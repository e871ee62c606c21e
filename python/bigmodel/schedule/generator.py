"""Seeded problems around a planted plan, so that each is feasible by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigmodel.schedule import validate
from bigmodel.schedule.problem import Job, PerSlot, Pool, Problem, Rate

COUNTS = (1, 2, 4, 8)
FAMILIES = ("A", "B", "C")
_FULLEST = 0.95  # share of capacity beyond which no plan is planted

# (name, ownership, price per device-hour, speed, billing), in the order in which pools are added.
_POOLS = (
    ("owned-a100", "owned", 0.4, 1.0, "slot"),
    ("on-demand-h100", "on_demand", 4.1, 2.1, "second"),
    ("spot-a100", "spot", 0.9, 1.0, "second"),
    ("reserved-h100", "reserved", 2.2, 2.1, "slot"),
    ("spot-l40s", "spot", 0.5, 0.55, "second"),
    ("on-demand-a100", "on_demand", 2.0, 1.0, "second"),
)


@dataclass(frozen=True)
class Planted:
    """problem, and a feasible plan for it, devices of shape (jobs, pools, slots). load: its share of capacity."""

    problem: Problem
    allocation: np.ndarray
    load: float


def generate(
    jobs: int = 20, pools: int = 3, slots: int = 48, load: float = 0.6, family: str = "B", seed: int = 0
) -> Planted:
    """A problem of hourly slots whose planted plan uses about `load` of the capacity.

    Args:
        family: "A" any whole number of devices over any pools, throughput linear; "B" gangs of 1, 2, 4 or 8 devices,
            throughput as devices^0.92; "C" is B with min_run 3, restart 0.25 h and 20 % of the jobs in precedence
            pairs.
        pools: 1 to 6.

    Raises:
        ValueError: an argument out of range.
    """
    validate.whole(jobs, "generate: jobs", least=1)
    validate.whole(pools, "generate: pools", least=1, most=len(_POOLS))
    validate.whole(slots, "generate: slots", least=1, most=validate.MOST_SLOTS)
    validate.whole(seed, "generate: seed", most=2**63 - 1)
    validate.choice(family, "generate: family", FAMILIES)
    if not validate.number(load, "generate: load", above=True) <= _FULLEST:
        raise ValueError(f"generate: load: is {load}; it must be at most {_FULLEST}.")
    rng = np.random.default_rng([seed, FAMILIES.index(family), jobs, pools, slots])
    counts = 8 * rng.integers(2, 7, pools)  # nodes of 8
    free = np.repeat(counts[:, None], slots, axis=1)
    table = np.zeros((jobs, pools, slots), dtype=np.int64)
    target = load * free.sum()
    sizes = rng.lognormal(0.0, 0.7, jobs)
    sizes *= target / sizes.sum()
    followers = {j: j - 1 for j in range(1, round(0.2 * jobs), 2)} if family == "C" else {}
    chunk = 3 if family == "C" else 1
    for j in sorted(range(jobs), key=lambda j: (j not in followers.values(), j not in followers, -sizes[j])):
        first = int(np.flatnonzero(table[followers[j]].sum(axis=0)).max()) + 1 if j in followers else 0
        last = slots * 2 // 3 if j in followers.values() else slots
        _place(rng, table[j], free, sizes[j], family, chunk, first, last)
    speeds = [speed for *_, speed, _ in _POOLS[:pools]]
    planned = tuple(_job(rng, j, table[j], speeds, family, slots, followers) for j in range(jobs))
    problem = Problem(
        slots=slots,
        start="2026-01-05T00:00",
        pools=tuple(_pool(rng, p, int(counts[p]), slots) for p in range(pools)),
        jobs=planned,
    )
    return Planted(problem, table, float(table.sum() / (counts.sum() * slots)))


def spot_prices(rng: np.random.Generator, mean: float, slots: int) -> np.ndarray:
    """Hourly prices that revert to a daily cycle (cheapest at night), shape (slots,).

    An Ornstein-Uhlenbeck process in logarithms around a cosine: reversion 0.15 per hour, noise 0.06.
    """
    noise, level = np.empty(slots), 0.0
    for slot in range(slots):
        level += -0.15 * level + 0.06 * rng.standard_normal()
        noise[slot] = level
    cycle = 0.2 * np.cos(2 * np.pi * (np.arange(slots) - 14) / 24)
    return np.round(mean * np.exp(cycle + noise), 4)


def _pool(rng: np.random.Generator, p: int, count: int, slots: int) -> Pool:
    name, ownership, price, _, billing = _POOLS[p]
    per_slot: PerSlot = (
        spot_prices(rng, price, slots) if ownership == "spot" else round(price * rng.uniform(0.9, 1.1), 3)
    )
    # Owned devices cost their energy, dearer by day.
    if ownership == "owned":
        per_slot = [round(price * (1.4 if 8 <= hour < 20 else 0.8), 3) for hour in range(24)]
    return Pool(name=name, count=count, price=per_slot, ownership=ownership, billing=billing)


def _place(rng, row, free, size: float, family: str, chunk: int, first: int, last: int) -> None:
    """Takes about `size` device-slots for one job out of `free`, in chunks, around a random time."""
    pools = free.shape[0]
    for p in rng.permutation(pools):
        for n in rng.permutation(COUNTS if family != "A" else np.arange(1, 9)):
            length = max(chunk, int(round(size / n / chunk)) * chunk)
            starts = [s for s in range(first, last - chunk + 1, chunk) if (free[p, s : s + chunk] >= n).all()]
            if len(starts) * chunk < length:
                continue
            centre = rng.uniform(first, last)
            chosen = sorted(starts, key=lambda s: abs(s + chunk / 2 - centre))[: length // chunk]
            for s in chosen:
                row[p, s : s + chunk] = n
                free[p, s : s + chunk] -= n
            return
    # Nothing has room for all of it: as much as one device gets on the emptiest pool.
    for p in np.argsort(-free[:, first:last].sum(axis=1)):
        starts = [s for s in range(first, last - chunk + 1, chunk) if (free[p, s : s + chunk] >= 1).all()]
        if starts:
            for s in starts[: max(1, int(size) // chunk)]:
                row[p, s : s + chunk] = 1
                free[p, s : s + chunk] -= 1
            return
    raise ValueError("generate: no room for another job; lower the load.")


def _job(rng, j: int, row: np.ndarray, speeds, family: str, slots: int, followers: dict[int, int]) -> Job:
    power = 1.0 if family == "A" else 0.92
    base = float(rng.uniform(800, 4000))
    restart = 0.25 if family == "C" else 0.0
    work, previous, first_run = 0.0, None, True
    used = np.flatnonzero(row.sum(axis=0))
    for s in used:
        p = int(np.argmax(row[:, s]))
        rate = base * speeds[p] * int(row[p, s]) ** power * 3600
        key = (p, int(row[p, s]), s - 1)
        lost = 0.0 if previous == key or first_run else restart
        work += rate * (1 - lost)
        previous, first_run = (p, int(row[p, s]), s), False
    last_rate = base * speeds[p] * int(row[p, used[-1]]) ** power * 3600
    work -= last_rate * float(rng.uniform(0.05, 0.6))
    counts = COUNTS if family != "A" else (8,)
    throughput = tuple(
        Rate(pool=_POOLS[q][0], devices=n, rate=round(base * speed * n**power, 6), source="assumed")
        for q, speed in enumerate(speeds)
        for n in counts
    )
    slack = rng.uniform(0.05, 0.6) * slots
    release = max(0, int(used[0] - rng.uniform(0, slack)))
    deadline = min(slots, int(used[-1] + 1 + rng.uniform(0, slack)))
    return Job(
        name=f"job-{j:03d}",
        work=float(round(work * (1 - 1e-7))),
        throughput=throughput,
        release=release,
        deadline=deadline,
        owner=f"team-{j % 3}",
        mix_pools=family == "A",
        min_run=3 if family == "C" else 1,
        restart=restart,
        after=(f"job-{followers[j]:03d}",) if j in followers else (),
    )
