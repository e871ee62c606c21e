"""A second reading of docs/planner.md's rules: a checker, a brute force and random problems. Shares no code with the
planner but the dataclasses that hold a problem."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np

from bigmodel.schedule import Job, Objective, Pool, Problem, Rate

EPS = 1e-6


def rate_per_hour(job, pool, devices):
    """Work per hour on `devices` of `pool`, interruptions counted; None where the job may not run."""
    known = {point.devices: point.rate for point in job.throughput if point.pool == pool.name}
    if not known or devices > max(known):
        return None
    if job.counts is not None:
        if devices not in job.counts:
            return None
    elif not job.mix_pools and devices not in known:
        return None
    if pool.node_size and devices > pool.node_size and devices % pool.node_size:
        return None
    if pool.memory is not None and job.memory > pool.memory:
        return None
    below = max((n for n in known if n <= devices), default=0)
    above = min(n for n in known if n >= devices)
    low, high = known.get(below, 0.0), known[above]
    rate = high if above == devices else low + (high - low) * (devices - below) / (above - below)
    return rate * 3600 / (1 + pool.interruptions_per_hour * (job.checkpoint_every / 2 + job.restart))


def follow(problem, job, row):
    """(cost, finish) of one job's row of the allocation, (pools, slots); a sentence where it breaks a rule."""
    h, tol = problem.slot_hours, EPS * job.work
    slots = [s for s in range(problem.now, problem.slots) if row[:, s].any()]
    if not slots:
        return "never runs"
    release = job.release if isinstance(job.release, int) else problem.clock.release(job.release)
    if slots[0] < release:
        return "before release"
    if job.deadline is not None and not job.soft and slots[-1] + 1 > problem.clock.deadline(job.deadline):
        return "after deadline"
    left, cost, lost, length, previous, runs = job.work - job.done, 0.0, 0.0, 0, None, 0
    if job.running is not None:  # a run that began before now and goes on, if it does, without loss
        at = [pool.name for pool in problem.pools].index(job.running.pool)
        previous, runs = ({at: job.running.devices}, problem.now - 1), 1
        length, lost = job.running.slots, job.running.setup_left
    for s in slots:
        held = {p: int(row[p, s]) for p in range(len(problem.pools)) if row[p, s]}
        if left <= tol:
            return "holds after its end"
        rates = {p: rate_per_hour(job, problem.pools[p], n) for p, n in held.items()}
        if None in rates.values():
            return "not allowed there"
        if len(held) > 1 and not job.mix_pools:
            return "spans pools"
        if not job.mix_pools and (previous != (held, s - 1)):
            if runs and (length < job.min_run or not job.preemptible):
                return "run too short or broken"
            (p,) = held
            lost = problem.pools[p].startup_hours + (job.restart if runs or job.started else 0.0)
            runs, length = runs + 1, 0
        length, previous = length + 1, (held, s)
        wasted = min(lost, h)
        lost -= wasted
        speed = sum(rates.values())
        work = speed * (h - wasted)
        share = 1.0
        if work >= left - tol:
            share = min(1.0, (wasted + left / speed) / h)
            left = 0.0
        else:
            left -= work
        for p, n in held.items():
            part = share if problem.pools[p].billing == "second" and left <= tol else 1.0
            cost += problem.price[p, s] * n * h * part
    if left > tol:
        return f"unfinished: {left} of {job.work}"
    return cost, slots[-1] + 1


def moved(problem, job, row):
    """What not going on as it runs at `now` weighs."""
    if job.running is None or row[problem.pool_index(job.running.pool), problem.now] == job.running.devices:
        return 0.0
    return problem.stability


def broken(problem, allocation):
    """The rules that an allocation breaks, and its cost with the value of what is dropped."""
    problem = problem.expanded
    wrong, total, finish, costs = [], 0.0, {}, {}
    for j, job in enumerate(problem.jobs):
        if not allocation[j].any() and job.value is not None:
            total += job.value + moved(problem, job, allocation[j])
            continue
        result = follow(problem, job, allocation[j])
        if isinstance(result, str):
            wrong.append(f"{job.name}: {result}")
            continue
        costs[job.name], finish[job.name] = job.spent + result[0], result[1]
        total += result[0] + moved(problem, job, allocation[j])
        first = int(np.flatnonzero(allocation[j].any(axis=0))[0])
        for before in job.after:
            if before not in finish and before in [other.name for other in problem.jobs[: j + 1]]:
                wrong.append(f"{job.name}: without {before}")
        job_first = first
        for before in job.after:
            other = [o.name for o in problem.jobs].index(before)
            used = np.flatnonzero(allocation[other].any(axis=0))
            if not len(used) or used[-1] >= job_first:
                wrong.append(f"{job.name}: before the end of {before}")
    used = allocation.sum(axis=0)
    if (used > problem.count).any() or (allocation < 0).any():
        wrong.append("capacity")
    for group, limit in problem.quotas.items():
        members = [p for p, pool in enumerate(problem.pools) if pool.quota_group == group]
        if (used[members].sum(axis=0) > limit).any():
            wrong.append(f"quota {group}")
    slack = 1 + 2 * EPS
    if problem.budget is not None and sum(costs.values()) > problem.budget * slack + 1e-5:
        wrong.append("budget")
    for job in problem.jobs:
        if job.budget is not None and costs.get(job.name, 0) > job.budget * slack + 1e-5:
            wrong.append(f"budget of {job.name}")
    for owner, limit in problem.budgets.items():
        if sum(costs.get(job.name, 0) for job in problem.jobs if job.owner == owner) > limit * slack + 1e-5:
            wrong.append(f"budget of owner {owner}")
    return wrong, total


def measure(problem, allocation, name):
    """An objective of an allocation that breaks no rule, read from the definitions alone."""
    rows = [(job, row) for job, row in zip(problem.jobs, allocation, strict=True) if row.any()]
    ends = [(job, int(np.flatnonzero(row.any(axis=0))[-1]) + 1) for job, row in rows]
    if name == "cost":
        return broken(problem, allocation)[1]
    if name == "makespan":
        return max((end * problem.slot_hours for _, end in ends), default=0.0)
    if name == "lateness":
        late = [(job, end - problem.clock.deadline(job.deadline)) for job, end in ends if job.deadline is not None]
        return sum(job.priority * max(0, slots) * problem.slot_hours for job, slots in late)
    if name == "fairness":
        alone = {job.name: fastest_alone(problem, job) for job, _ in ends}
        return max(((end - problem.clock.release(job.release)) / alone[job.name] for job, end in ends), default=0.0)
    if name == "owner_fairness":
        worst = 0.0
        for owner in {job.owner for job, _ in ends}:
            mine = [(problem.clock.release(job.release), end, job) for job, end in ends if job.owner == owner]
            first = min(release for release, _, _ in mine)
            alone = max(release + fastest_alone(problem, job) for release, _, job in mine) - first
            worst = max(worst, (max(end for _, end, _ in mine) - first) / alone)
        return worst
    # Carbon is a cost at other prices.
    pools = tuple(
        replace(pool, price={"slots": [gram * pool.kw * pool.pue / 1000 for gram in pool.carbon["slots"]]})
        for pool in problem.pools
    )
    return sum(follow(replace(problem, pools=pools), job, row)[0] for job, row in rows)


def fastest_alone(problem, job):
    """Slots that the whole job takes on its fastest pool and count."""
    hours = [
        pool.startup_hours + job.work / rate_per_hour(job, pool, n)
        for p, pool in enumerate(problem.pools)
        for n in range(1, int(problem.count[p].max()) + 1)
        if rate_per_hour(job, pool, n) is not None
    ]
    return max(1, math.ceil(min(hours) / problem.slot_hours - EPS))


def droppable(problem, job):
    objective = problem.objective
    if objective.weights:
        return job.value is not None and objective.weights.get("cost", 0) > 0
    first = objective.order[0] == "cost" or (objective.order[:2] == ("lateness", "cost") and not job.soft)
    return job.value is not None and first


def brute_force(problem):
    """The least of the problem's objective over every allocation, as a tuple with one value for each stage, and None
    where there is no plan. For tiny problems without mix_pools."""
    objective, options = problem.objective, []
    order = objective.order
    if {"fairness", "owner_fairness"} & set(order) and "cost" not in order:
        order = (*order, "cost")
    for job in problem.jobs:
        choices = [None] + [
            (p, n)
            for p, pool in enumerate(problem.pools)
            for n in range(1, int(problem.count[p].max()) + 1)
            if rate_per_hour(job, pool, n) is not None
        ]
        rows = [None] if droppable(problem, job) else []
        for choice in itertools.product(choices, repeat=problem.slots - problem.now):
            row = np.zeros((len(problem.pools), problem.slots), dtype=int)
            for s, at in enumerate(choice, problem.now):
                if at is not None:
                    row[at[0], s] = at[1]
            if not isinstance(follow(problem, job, row), str):
                rows.append(row)
        options.append(rows)
    best = None
    for rows in itertools.product(*options):
        empty = np.zeros((len(problem.pools), problem.slots), dtype=int)
        table = np.array([empty if row is None else row for row in rows])
        if (table.sum(axis=0) > problem.count).any():
            continue
        if broken(problem, table)[0]:
            continue
        if objective.weights:
            values = (sum(weight * measure(problem, table, name) for name, weight in objective.weights.items()),)
        else:
            values = tuple(measure(problem, table, name) for name in order)
        if best is None or _before(values, best):
            best = values
    return best


def _before(values, best):
    """Lexicographically less, by more than rounding."""
    for value, other in zip(values, best, strict=True):
        if abs(value - other) > EPS * max(1.0, abs(other)):
            return value < other
    return False


def with_objective(problem, seed):
    """The problem with carbon, soft deadlines and another objective."""
    rng = random.Random(seed)
    pools = tuple(
        replace(pool, kw=rng.choice([0.0, 0.5, 1.0]), pue=1.2,
                carbon={"slots": [rng.choice([50.0, 200.0, 500.0]) for _ in range(problem.slots)]})
        for pool in problem.pools
    )  # fmt: skip
    jobs = tuple(
        replace(job, deadline=rng.randrange(problem.slots), soft=True, priority=rng.choice([0.5, 1.0, 3.0]))
        if rng.random() < 0.5 else job
        for job in problem.jobs
    )  # fmt: skip
    names = rng.sample(["cost", "makespan", "lateness", "carbon", "fairness"], rng.randint(1, 3))
    weights = {name: rng.choice([0.1, 1.0, 5.0]) for name in names} if rng.random() < 0.35 else {}
    objective = Objective(weights=weights) if weights else Objective(order=tuple(names))
    return replace(problem, pools=pools, jobs=jobs, objective=objective)


def changes(problem, seed):
    """What may have happened to a plan's problem meanwhile."""
    rng, happened = random.Random(seed), {}
    if rng.random() < 0.5:
        happened["prices"] = {rng.choice(problem.pools).name: rng.choice([0.1, 6.0])}
    if rng.random() < 0.4:
        job = rng.choice(problem.jobs)
        happened["progress"] = {job.name: rng.uniform(0, 0.6) * job.work}
    if rng.random() < 0.3:
        happened["failed"] = [rng.choice(problem.jobs).name]
    if rng.random() < 0.2:
        happened["gone"] = [rng.choice(problem.pools).name]
    return happened


def random_problem(seed, tiny=False):
    """A problem with a planted feasible plan: (problem, allocation). Every feature of the rules turns up."""
    rng = random.Random(seed)
    while True:
        found = _attempt(rng, tiny)
        if found is not None:
            return found


def _attempt(rng, tiny):
    slots = rng.randint(2, 4) if tiny else rng.randint(5, 16)
    h = rng.choice([0.5, 1.0, 2.0])
    pools = []
    for p in range(rng.randint(1, 2 if tiny else 3)):
        spot = rng.random() < 0.3
        counts = [rng.randint(1, 2) if tiny else rng.randint(2, 9)] * slots
        if rng.random() < 0.3:
            counts[rng.randrange(slots)] -= 1
        pools.append(
            Pool(
                name=f"p{p}",
                count={"slots": counts},
                price={"slots": [round(rng.uniform(0.2, 5), 3) for _ in range(slots)]},
                ownership="spot" if spot else "on_demand",
                interruptions_per_hour=rng.choice([0.05, 0.2]) if spot else 0.0,
                billing=rng.choice(["slot", "second"]),
                startup_hours=rng.choice([0.0, 0.0, 0.1, 0.5, 1.2]) * min(h, 1),
                quota_group="q" if rng.random() < 0.2 else None,
            )
        )
    names = rng.randint(1, 2) if tiny else rng.randint(1, 6)
    free = np.array([pool.count["slots"] for pool in pools])
    price = np.array([pool.price["slots"] for pool in pools])
    table = np.zeros((names, len(pools), slots), dtype=int)
    jobs, finish, total, costs = [], [], 0.0, []
    for j in range(names):
        job, row, cost = _job(rng, j, pools, free, slots, h, finish, jobs, tiny, price)
        if job is None:
            return None
        table[j] = row
        free = free - row
        jobs.append(job)
        costs.append(cost)
        finish.append(int(np.flatnonzero(row.any(axis=0))[-1]) + 1)
        total += cost
    quota = int(
        table[[*range(names)]][:, [p for p, pool in enumerate(pools) if pool.quota_group]]
        .sum(axis=(0, 1))
        .max(initial=0)
    )
    quotas = {"q": max(1, quota + rng.randint(0, 2))} if any(pool.quota_group for pool in pools) else {}
    budget = total * rng.uniform(1.0, 1.3) + 0.01 if rng.random() < 0.2 else None
    problem = Problem(slots=slots, slot_hours=h, pools=tuple(pools), jobs=tuple(jobs), quotas=quotas, budget=budget)
    return problem, table


def _job(rng, j, pools, free, slots, h, finish, jobs, tiny, price):
    """One job around a random schedule in what is free: the schedule first, then work and limits that fit it."""
    mix = not tiny and rng.random() < 0.15
    preemptible = mix or rng.random() < 0.8
    min_run = 1 if mix or rng.random() < 0.6 else rng.randint(2, 3)
    restart = 0.0 if mix else rng.choice([0.0, 0.0, 0.1, 0.25, 0.6]) * h
    checkpoint = rng.choice([0.0, 0.5])
    usable = [p for p in range(len(pools)) if not mix or pools[p].startup_hours == 0]
    counts = [1, 2] if tiny else [1, 2, 4]
    if not usable:
        return None, None, None
    base, power = rng.uniform(1, 50), 1.0 if mix else rng.uniform(0.7, 1.0)
    speed = {p: rng.uniform(0.5, 2) for p in usable}
    throughput = tuple(
        Rate(pool=pools[p].name, devices=n, rate=base * speed[p] * n**power) for p in usable for n in counts
    )
    after, first = (), 0
    if jobs and rng.random() < 0.25:
        before = rng.randrange(len(jobs))
        after, first = (jobs[before].name,), finish[before]
    row = np.zeros(free.shape, dtype=int)
    s, runs = first + rng.randint(0, max(0, slots - first - 1)) // 2, 0
    most_runs = 1 if not preemptible else rng.randint(1, 3)
    while s < slots and runs < most_runs:
        p, n = rng.choice(usable), rng.choice(counts)
        length = rng.randint(min_run, min_run + 3)
        if s + length <= slots and (free[p, s : s + length] >= n).all():
            row[p, s : s + length] = n
            s, runs = s + length, runs + 1
            if rng.random() < 0.5:
                s += rng.randint(0, 2)
        else:
            s += 1
    if not runs:
        return None, None, None
    job = Job(
        name=f"j{j}", work=1e15, throughput=throughput, preemptible=preemptible, min_run=min_run, restart=restart,
        checkpoint_every=checkpoint, after=after, mix_pools=mix,
    )  # fmt: skip
    problem = Problem(slots=slots, slot_hours=h, pools=tuple(Pool(**{**vars(q), "quota_group": None}) for q in pools),
                      jobs=(Job(**{**vars(job), "after": ()}),))  # fmt: skip
    verdict = follow(problem, problem.jobs[0], row)
    if not isinstance(verdict, str) or not verdict.startswith("unfinished"):
        return None, None, None
    done = 1e15 - float(verdict.split()[1])
    used = np.flatnonzero(row.any(axis=0))
    last = sum(rate_per_hour(job, pools[p], int(row[p, used[-1]])) for p in np.flatnonzero(row[:, used[-1]])) * h
    work = done - min(last, done) * rng.uniform(0.0, 0.4) if done < 1e9 else 0
    if work <= 0:
        return None, None, None
    work *= 1 - 1e-6
    release = rng.randint(0, int(used[0])) if not after else 0
    deadline = rng.randint(int(used[-1]) + 1, slots)
    values = {**vars(job), "work": work, "release": release, "deadline": deadline}
    final = Job(**{**values, "after": ()})
    checked = Problem(slots=slots, slot_hours=h, pools=problem.pools, jobs=(final,))
    verdict = follow(checked, final, row)
    if isinstance(verdict, str):
        return None, None, None
    cost = verdict[0]
    budget = cost * rng.uniform(1.0, 1.3) + 0.01 if rng.random() < 0.15 else None
    value = round(rng.uniform(0.1, 2) * cost + 0.1, 3) if rng.random() < 0.15 and not after else None
    if any(other.value is not None and other.name in after for other in jobs):
        value = cost * 10
    return Job(**{**values, "budget": budget, "value": value}), row, cost


def isclose(a, b, tolerance=1e-5):
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
