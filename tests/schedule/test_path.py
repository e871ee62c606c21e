"""One job's cheapest schedule against a plain reading of path.h: recursion over (slot, work left, what ran)."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import second_checker

from bigmodel.schedule import instance, path
from bigmodel.schedule.problem import Job, Pool, Problem, Rate, Running

SEEDS = 25
UNITS = 7  # in a slot's work: a small grid has every rounding in it
ROUND = {
    "up": (lambda x: math.ceil(x - 1e-9), np.ceil),
    "nearest": (round, np.round),
    "down": (lambda x: math.floor(x + 1e-9), np.floor),
}


def grid(data, free, h, rounding, first, last):
    """Units of work and the size of one: of steps up to 1.4 times the finest, the one by which rates round least."""
    gains = np.array([r * h for p, n, r in zip(data.pool, data.devices, data.rate, strict=True) if
                      (free[p, first:last] >= n).any()])  # fmt: skip
    if not len(gains):
        return 1, data.work
    finest = max(gains.min() / UNITS, data.work / path.MOST_UNITS["tied" if data.switches else "free"])
    if data.work <= finest:
        return 1, data.work
    steps = np.linspace(finest, min(1.4 * finest, data.work), 256 if rounding == "up" else 32)
    units = gains[None, :] / steps[:, None]
    step = steps[np.argmin(np.abs(ROUND[rounding][1](units) / units - 1).mean(axis=1))]
    count = data.work / step
    return max(1, math.floor(count + 1e-9) if rounding == "up" else math.ceil(count - 1e-9)), step


def least_cost(data, unit, free, h, rounding, stability):
    """What the dynamic programme must find, without its tables."""
    job, first, last = data.job, data.first, data.last
    count, step = grid(data, free, h, rounding, first, last)

    def commitment(k, loss, least):
        slots = min(max(least, math.ceil(loss / h - 1e-9), 1), last - first)
        done = [ROUND[rounding][0](max(0.0, (q + 1) * h - loss) * data.rate[k] / step) for q in range(slots)]
        return [(done[q], min(h, max(0.0, loss - q * h))) for q in range(slots)]

    def held(k, s, left, plan):
        paid, before, p, n = 0.0, 0, data.pool[k], data.devices[k]
        for q, (done, lost) in enumerate(plan):
            if s + q >= last or free[p, s + q] < n:
                return math.inf
            price = unit[p, s + q] * n * h
            if done >= left:
                part = min(1.0, (lost + (left - before) * step / data.rate[k]) / h) if data.second[k] else 1.0
                return paid + price * part + data.late[s + q + 1]
            paid, before = paid + price, done
        return paid + value(s + len(plan), left - before, k)

    @cache
    def value(s, left, ran):
        if s >= last:
            return math.inf
        loss = data.startup + job.restart
        found = [value(s + 1, left, -1)]
        found += [held(k, s, left, commitment(k, loss[k], job.min_run)) for k in range(len(data.pool))]
        if ran >= 0:
            found.append(held(ran, s, left, commitment(ran, 0.0, 1)))
        return min(found)

    found, running = [math.inf], job.running
    if running is not None and data.running is not None:
        plan = commitment(data.running, running.setup_left, max(1, job.min_run - running.slots))
        found.append(held(data.running, first, count, plan))
    if running is None or data.running is None or (job.preemptible and running.slots >= job.min_run):
        moved = 0.0 if running is None else stability
        loss = data.startup + (job.restart if job.started else 0.0)
        for k in range(len(data.pool)):
            plan = commitment(k, loss[k], job.min_run)
            found += [held(k, s, count, plan) + data.early[s] + moved for s in range(first, last)]
    return min(found)


def least_run(data, unit, free, h, stability):
    job, found = data.job, [math.inf]
    goes_on = job.running is not None and data.running is not None
    for k in [data.running] if goes_on else range(len(data.pool)):
        loss = job.running.setup_left if goes_on else data.startup[k] + (job.restart if job.started else 0.0)
        hours = loss + data.work / data.rate[k]
        length = max(1, math.ceil(hours / h - 1e-9))
        paid = np.ones(length)
        paid[-1] = hours / h - (length - 1) if data.second[k] else 1.0
        p, n = data.pool[k], data.devices[k]
        for s in range(data.first, data.first + 1 if goes_on else data.last):
            if s + length <= data.last and (free[p, s : s + length] >= n).all():
                cost = (unit[p, s : s + length] * paid).sum() * n * h
                found.append(cost + data.late[s + length] + data.early[s])
    return min(found) + (stability if job.running is not None and not goes_on else 0.0)


def jobs(seed):
    """Jobs of a random problem at random prices: some run already, some have a price on their start and end."""
    rng = np.random.default_rng(seed)
    problem = second_checker.random_problem(seed, tiny=False)[0].expanded
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    for data in inst.jobs:
        if data.job.mix_pools or not len(data.pool) or data.last <= data.first:
            continue
        unit = inst.unit * rng.uniform(0.5, 2, inst.unit.shape) + rng.uniform(0, 0.3, inst.unit.shape)
        free = np.minimum(inst.free(), rng.integers(0, 9, inst.count.shape) + (6 if rng.random() < 0.7 else 0))
        if rng.random() < 0.4:
            steps = rng.uniform(0, 1, (2, len(data.late)))
            data = replace(data, late=data.late + np.cumsum(steps[0]), early=np.cumsum(steps[1])[::-1].copy())
        if rng.random() < 0.4:
            k = int(rng.integers(-1, len(data.pool)))
            at = {"pool": problem.pools[data.pool[max(k, 0)]].name, "devices": int(data.devices[max(k, 0)])}
            running = Running(**at, slots=int(rng.integers(1, 4)), setup_left=float(rng.choice([0, 0.3, 1.2])))
            job = replace(data.job, running=running, done=1e-9)
            data = replace(data, job=job, running=None if k < 0 else k)
        yield data, unit, free, inst.h


@pytest.mark.parametrize("rounding", ROUND)
def test_the_dynamic_programme_equals_recursion(rounding):
    found = 0
    for seed in range(SEEDS):
        for data, unit, free, h in jobs(seed):
            window = {"first": data.first, "last": data.last}
            ours = path.cheapest(data, unit, free, h, rounding=rounding, units=UNITS, stability=1.5, **window)
            if rounding == "nearest" and ours.cost == np.inf:
                continue  # refused where the schedule ends short of the work
            assert ours.cost == pytest.approx(least_cost(data, unit, free, h, rounding, 1.5), rel=1e-9)
            found += ours.cost < np.inf
    assert found > SEEDS


def test_roundings_enclose_the_best_and_the_schedule_does_the_work():
    for seed in range(SEEDS):
        for data, unit, free, h in jobs(seed):
            if data.job.running is not None:
                continue
            window = {"first": data.first, "last": data.last}
            low = path.cheapest(data, unit, free, h, rounding="up", **window).cost
            high = path.cheapest(data, unit, free, h, rounding="down", **window)
            assert low <= high.cost * (1 + 1e-9)
            if high.cost < np.inf:
                assert worked(data, high.use, h) >= data.work * (1 - 1e-9)
                assert all(data.first <= s < data.last and free[p, s] >= n for s, p, n in high.use)


@pytest.mark.parametrize("rounding", ROUND)
def test_a_job_that_needs_every_slot_gets_it(rounding):
    """No unit of the grid may be taken for one that is left too late."""
    rate = Rate(pool="p", devices=2, rate=1 / 3600)
    job = Job(name="j", work=6.0, throughput=(rate,), min_run=2, restart=0.5)
    problem = Problem(slots=6, pools=(Pool(name="p", count=2, price=1.0),), jobs=(job,))
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    found = path.cheapest(inst.jobs[0], inst.unit, inst.free(), 1.0, rounding=rounding, first=0, last=6)
    assert found.cost == pytest.approx(12.0)


def worked(data, use, h):
    total, before, lost = 0.0, None, 0.0
    for s, p, n in use:
        k = int(np.flatnonzero((data.pool == p) & (data.devices == n))[0])
        if before != (s - 1, p, n):
            lost = data.startup[k] + (data.job.restart if before or data.job.started else 0.0)
        total += max(0.0, h - lost) * data.rate[k]
        lost, before = max(0.0, lost - h), (s, p, n)
    return total


def test_an_unbroken_run_equals_trying_every_start():
    found = 0
    for seed in range(SEEDS):
        for data, unit, free, h in jobs(seed):
            ours = path.unbroken(data, unit, free, h, data.first, data.last, 1.5)
            assert ours.cost == pytest.approx(least_run(data, unit, free, h, 1.5), rel=1e-9)
            assert (ours.cost < np.inf) == bool(ours.use)
            found += ours.cost < np.inf
    assert found > SEEDS


def alone(work, *rates, **pool):
    """A job's data where one device of pool i does rates[i] of its work in a second, and its price and free devices."""
    points = tuple(Rate(pool=f"p{i}", devices=1, rate=rate) for i, rate in enumerate(rates))
    pools = tuple(Pool(name=f"p{i}", count=1, price=1.0, billing="second", **pool) for i in range(len(rates)))
    problem = Problem(slots=6, pools=pools, jobs=(Job(name="j", work=work, throughput=points),))
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    return inst.jobs[0], inst.unit, inst.free(), 1.0


@pytest.mark.parametrize("work", [0.1, 5.0, 17.0])
def test_work_of_less_than_a_unit_costs_no_more_than_it_takes(work):
    """A unit of more than the work would make the bound dearer than the job."""
    low, high = (path.cheapest(*alone(work, 1.0, 0.77), rounding=r, first=0, last=6).cost for r in ("up", "down"))
    assert low <= work / 3600 * (1 + 1e-9)
    assert high == pytest.approx(work / 3600)
    fine = path.cheapest(*alone(1e-5, 1e12), rounding="up", units=path.FINE, like=[(5, 0, 1)], first=0, last=6).cost
    assert fine == pytest.approx(1e-17 / 3600)


@pytest.mark.parametrize("rounding", ROUND)
def test_more_units_and_slots_than_whole_numbers_count(rounding):
    window = {"rounding": rounding, "first": 0, "last": 6}
    assert path.cheapest(*alone(1.0, 1e18, 1e-6), **window).cost < 1e-12
    assert path.cheapest(*alone(1.0, 1.0, startup_hours=1e18), **window).cost == np.inf
    data, *rest = alone(1.0, 1e-30, 1.0)
    assert path.unbroken(data, *rest, 0, 6).use == ((0, 1, 1),)


@pytest.mark.parametrize("wrong", [{"like": [(0, 9, 1)]}, {"units": -1}, {"rate": 0.0}, {"work": 0.0}, {"h": 0.0}])
def test_what_no_grid_can_be_made_of_is_refused(wrong):
    data, unit, free, h = alone(3600.0, 1.0)
    options = {name: wrong[name] for name in ("like", "units") if name in wrong}
    data = replace(data, work=wrong.get("work", data.work), rate=data.rate * wrong.get("rate", 1.0))
    with pytest.raises(ValueError, match=r"^planner: .*\.$"):
        path.cheapest(data, unit, free, wrong.get("h", h), rounding="up", first=0, last=6, **options)


@pytest.mark.parametrize("wrong", ["shape", "window", "pool", "slots"])
def test_what_does_not_fit_together_is_refused(wrong):
    data, unit, free, h = next(jobs(0))
    last = unit.shape[1] + 1 if wrong == "window" else data.last
    free = free[:, :-1] if wrong == "shape" else free
    if wrong == "pool":
        data = replace(data, pool=data.pool + len(unit))
    if wrong == "slots":
        data = replace(data, late=data.late[:-1])
    with pytest.raises(ValueError, match=r"^planner: .*\.$"):
        path.cheapest(data, unit, free, h, rounding="up", first=data.first, last=last)
