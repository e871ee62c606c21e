"""Replays a trace of prices and interruptions against a policy, one slot after the other."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule import rates, validate
from bigmodel.schedule.generator import spot_prices
from bigmodel.schedule.instance import build, stage_for
from bigmodel.schedule.problem import Job, Problem, Running
from bigmodel.schedule.search import Search
from bigmodel.schedule.worker import shared

POLICIES = ("plan", "greedy", "fcfs", "on_demand")
BOUND = "clairvoyant"
_REVERSION = 0.15  # per hour: how fast a price is expected to return to its daily cycle
_DOWN_HOURS = 3  # how long a spot pool that is down is expected to stay so


@dataclass(frozen=True)
class Trace:
    """What really happens: price per device-hour and devices, (pools, slots); mean: the daily cycle of the price."""

    price: np.ndarray
    count: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """cost: currency; of BOUND, a lower bound on it. missed: jobs late or unfinished, so also those with a value that
    were left out. interruptions: runs that a pool's end cut."""

    policy: str
    cost: float
    missed: tuple[str, ...]
    interruptions: int
    seconds: float


def trace(problem: Problem, seed: int) -> Trace:
    """Spot prices that revert to a daily cycle, and spot pools up for 1 to 24 hours and down for 1 to 6."""
    rng, h = np.random.default_rng(seed), problem.slot_hours
    hour = np.floor(np.arange(problem.slots) * h + 1e-9).astype(int)
    price, count = problem.price.copy(), problem.count.copy()
    mean = price.copy()
    for p, pool in enumerate(problem.pools):
        if pool.ownership != "spot":
            continue
        level = float(problem.price[p].mean())
        price[p] = spot_prices(rng, level, int(hour[-1]) + 1)[hour]
        mean[p] = level * np.exp(0.2 * np.cos(2 * np.pi * (hour - 14) / 24))
        at = int(rng.integers(0, 12))
        while at <= hour[-1]:
            down = int(rng.integers(1, 7))
            count[p, (hour >= at) & (hour < at + down)] = 0
            at += down + int(rng.integers(1, 25))
    return Trace(price, count, mean)


def simulate(problem: Problem, trace: Trace, policy: str = "plan", seed: int = 0) -> Outcome:
    """Runs a policy through a trace; it sees the present slot's prices and devices, and of later slots what it expects.

    Policies, each forced onto on-demand devices once nothing slower would be in time: "plan" plans again in every slot;
    "greedy" takes for each job what does work cheapest now; "fcfs" the first job first and the cheapest devices that
    are free; "on_demand" only on-demand devices. "clairvoyant" is no policy but the lower bound on the cost of all that
    meet every deadline. A job on a pool that goes down loses half a checkpoint's interval of work, and its restart when
    it starts again. Budgets do not hold a policy back.

    Raises:
        ValueError: an unknown policy, a trace of another shape, a job that mixes pools, or one without a fallback.
    """
    validate.choice(policy, "simulate: policy", (*POLICIES, BOUND))
    shape = (len(problem.pools), problem.slots)
    for name, table in vars(trace).items():
        if np.shape(table) != shape:
            raise ValueError(f"simulate: trace.{name} has shape {np.shape(table)}, but pools and slots are {shape}.")
    if policy == BOUND:
        begin = time.monotonic()
        return Outcome(policy, clairvoyant(problem, trace), (), 0, time.monotonic() - begin)
    return _Replay(problem.expanded, trace, policy, seed).run()


def clairvoyant(problem: Problem, trace: Trace, seconds: float = 10.0, gap: float = 0.01) -> float:
    """A lower bound on the cost of any policy that meets every deadline, knowing the whole trace."""
    known = _with(problem.expanded, trace.price, trace.count, calm=True)
    inst = build(known, stage_for(known, {"cost": 1.0}))
    return Search(inst, shared(), time.monotonic() + seconds, gap).run().bound


def _with(problem: Problem, price: np.ndarray, count: np.ndarray, calm: bool = False) -> Problem:
    pools = tuple(
        replace(
            pool,
            price={"slots": price[p].tolist()},
            count={"slots": count[p].tolist()},
            interruptions_per_hour=0.0 if calm else pool.interruptions_per_hour,
        )
        for p, pool in enumerate(problem.pools)
    )
    return replace(problem, pools=pools)


@dataclass
class _Live:
    """A job on its way: where it runs, since how many slots, and the set-up hours still to lose."""

    job: Job
    left: float
    at: tuple[int, int] | None = None
    slots: int = 0
    setup: float = 0.0
    started: bool = False
    finish: int | None = None


class _Replay:
    def __init__(self, problem: Problem, trace: Trace, policy: str, seed: int):
        self.problem, self.trace, self.policy, self.seed = problem, trace, policy, seed
        self.jobs = [_Live(job, job.work - job.done) for job in problem.jobs]
        self.cost, self.interruptions = 0.0, 0
        # The trace interrupts, so a rate is what the devices give while they are there.
        calm = [replace(pool, interruptions_per_hour=0.0) for pool in problem.pools]
        self.rate = [[rates.hourly(job, pool) for pool in calm] for job in problem.jobs]
        for job, rate in zip(problem.jobs, self.rate, strict=True):
            if job.mix_pools:
                raise ValueError(f"simulate: job {job.name} mixes pools; a replay holds one pool for a job.")
            if not any(rate[p] for p in self._fallback()):
                kind = "on-demand" if policy == "on_demand" else "owned, reserved or on-demand"
                raise ValueError(f"simulate: job {job.name} has no {kind} pool to fall back to.")

    def run(self) -> Outcome:
        begin = time.monotonic()
        for slot in range(self.problem.slots):
            self._interrupt(slot)
            wanted = getattr(self, f"_{self.policy}")(slot)
            self._step(slot, wanted)
        missed = [live.job.name for live in self.jobs if not self._in_time(live)]
        return Outcome(self.policy, float(self.cost), tuple(missed), self.interruptions, time.monotonic() - begin)

    def _in_time(self, live: _Live) -> bool:
        if live.finish is None:
            return False
        return live.job.deadline is None or live.finish <= self.problem.clock.deadline(live.job.deadline)

    def _open(self, slot: int) -> list[int]:
        """Jobs that could run now."""
        done = {live.job.name for live in self.jobs if live.finish is not None and live.finish <= slot}
        release = self.problem.clock.release
        return [
            j
            for j, live in enumerate(self.jobs)
            if live.finish is None and release(live.job.release) <= slot and set(live.job.after) <= done
        ]

    def _interrupt(self, slot: int) -> None:
        free = _Free(self.problem, self.trace.count[:, slot])
        for j, live in enumerate(self.jobs):
            if live.at is not None and not free.take(*live.at):
                lost = self.rate[j][live.at[0]][live.at[1]] * live.job.checkpoint_every / 2
                live.left = min(live.job.work, live.left + lost)
                live.at = None
                self.interruptions += 1

    def _step(self, slot: int, wanted: dict[int, tuple[int, int]]) -> None:
        h = self.problem.slot_hours
        for j, live in enumerate(self.jobs):
            at = wanted.get(j)
            if at is None:
                live.at = None
                continue
            p, n = at
            if at != live.at:
                live.setup = self.problem.pools[p].startup_hours + (live.job.restart if live.started else 0.0)
                live.slots = 0
            live.at, live.started, live.slots = at, True, live.slots + 1
            waste = min(h, live.setup)
            live.setup -= waste
            rate = self.rate[j][p][n]
            hours = min(h, waste + live.left / rate)
            live.left -= rate * (hours - waste)
            ends = live.left <= 1e-9 * live.job.work
            held = hours if ends and self.problem.pools[p].billing == "second" else h
            self.cost += held * n * self.trace.price[p, slot]
            if ends:
                live.finish, live.at = slot + 1, None

    # --- policies -----------------------------------------------------------------------------------------------------

    def _fallback(self) -> list[int]:
        """Pools that no trace takes away, and that the policy may use."""
        kept = ("on_demand",) if self.policy == "on_demand" else ("owned", "reserved", "on_demand")
        return [p for p, pool in enumerate(self.problem.pools) if pool.ownership in kept]

    def _urgent(self, j: int, slot: int) -> bool:
        """Whether the job must run on steady devices from now on to be in time, with one slot to spare."""
        live = self.jobs[j]
        if live.job.deadline is None:
            return False
        speeds = [rate for p in self._fallback() for rate in self.rate[j][p].values()]
        setup = max(self.problem.pools[p].startup_hours for p in self._fallback()) + live.job.restart
        need = math.ceil((live.left / max(speeds) + setup) / self.problem.slot_hours)
        return self.problem.clock.deadline(live.job.deadline) - slot <= need + 1

    def _goes_on(self, j: int) -> bool:
        """Whether the job's run may not be broken off: it is not preemptible, or shorter than min_run yet."""
        live = self.jobs[j]
        return live.at is not None and (not live.job.preemptible or live.slots < live.job.min_run)

    def _take(self, slot: int, order: list[int], allowed, keep=()) -> dict[int, tuple[int, int]]:
        """`keep`, and what may not be broken off, goes on; then each job in turn takes the pool that does its work
        cheapest now, and there all it can; the urgent first."""
        free = _Free(self.problem, self.trace.count[:, slot])
        taken: dict[int, tuple[int, int]] = {}
        for j in order:
            at = self.jobs[j].at
            if at is not None and (j in keep or self._goes_on(j)):
                taken[j] = at
                free.take(*at)
        for j in sorted(set(order) - set(taken), key=lambda j: (not self._urgent(j, slot), order.index(j))):
            urgent = self._urgent(j, slot)
            pools = self._fallback() if urgent else allowed
            options = []
            for p in pools:
                fits = {n: rate for n, rate in self.rate[j][p].items() if n <= free.room(p)}
                price = min((self.trace.price[p, slot] * n / rate for n, rate in fits.items()), default=0.0)
                options += [((-rate, price) if urgent else (price, -rate), p, n) for n, rate in fits.items()]
            if options:
                _, p, n = min(options)
                taken[j] = (p, n)
                free.take(p, n)
        return taken

    def _greedy(self, slot: int) -> dict[int, tuple[int, int]]:
        order = sorted(self._open(slot), key=lambda j: self._due(j))
        return self._take(slot, order, range(len(self.problem.pools)))

    def _fcfs(self, slot: int) -> dict[int, tuple[int, int]]:
        """Whoever runs goes on, but for the urgent; then by release."""
        release = self.problem.clock.release
        order = sorted(self._open(slot), key=lambda j: (self.jobs[j].at is None, release(self.jobs[j].job.release), j))
        steady = self._fallback()
        on = [(j, self.jobs[j].at) for j in order]
        keep = {j for j, at in on if at is not None and (at[0] in steady or not self._urgent(j, slot))}
        return self._take(slot, order, range(len(self.problem.pools)), keep)

    def _on_demand(self, slot: int) -> dict[int, tuple[int, int]]:
        return self._take(slot, sorted(self._open(slot), key=self._due), self._fallback())

    def _due(self, j: int) -> tuple[int, int]:
        job = self.jobs[j].job
        return (self.problem.slots if job.deadline is None else self.problem.clock.deadline(job.deadline), j)

    def _plan(self, slot: int) -> dict[int, tuple[int, int]]:
        """What a fresh plan over the expected future does now; where none is found, what "greedy" does."""
        waiting = [j for j, live in enumerate(self.jobs) if live.finish is None]
        if not waiting:
            return {}
        problem = self._expected(slot, waiting)
        inst = build(problem, stage_for(problem, {"cost": 1.0}))
        found = Search(inst, shared(), time.monotonic() + 5.0, gap=0.01, seed=self.seed).sketch()
        wanted: dict[int, tuple[int, int]] = {}
        for i, use in (found.best or {}).items():
            for s, p, n in use:
                if s == slot:
                    wanted[waiting[i]] = (p, n)
        if found.best is None:
            return self._greedy(slot)
        return wanted

    def _expected(self, slot: int, waiting: list[int]) -> Problem:
        """The problem as it looks from this slot: prices return to their cycle, pools that are down come back."""
        problem, later = self.problem, np.arange(self.problem.slots) - slot
        hours = np.maximum(later, 0) * problem.slot_hours
        ratio = self.trace.price[:, slot] / np.maximum(self.trace.mean[:, slot], 1e-12)
        price = self.trace.mean * ratio[:, None] ** np.exp(-_REVERSION * hours)
        count = problem.count.copy()
        for p, pool in enumerate(problem.pools):
            if pool.ownership == "spot" and self.trace.count[p, slot] == 0:
                count[p, (later >= 0) & (hours < _DOWN_HOURS)] = 0
        jobs = []
        names = {self.jobs[j].job.name for j in waiting}
        for j in waiting:
            live, job = self.jobs[j], self.jobs[j].job
            running = None
            if live.at is not None:
                name = problem.pools[live.at[0]].name
                running = Running(pool=name, devices=live.at[1], slots=live.slots, setup_left=live.setup)
            after = tuple(name for name in job.after if name in names)
            # A deadline that cannot be met is kept out of the way: the job then runs as soon as it can.
            jobs.append(
                replace(
                    job,
                    done=job.work - live.left,
                    started=live.started,
                    running=running,
                    after=after,
                    deadline=self._reachable(j, slot),
                )
            )
        return _with(replace(problem, now=slot, jobs=tuple(jobs)), price, count)

    def _reachable(self, j: int, slot: int) -> int | None:
        """The deadline less a slot to spare for an interruption, or the soonest end that can still be reached."""
        live = self.jobs[j]
        if live.job.deadline is None:
            return None
        speeds = [rate for p in self._fallback() for rate in self.rate[j][p].values()]
        setup = max(self.problem.pools[p].startup_hours for p in self._fallback()) + live.job.restart
        first = max(slot, self.problem.clock.release(live.job.release))
        soonest = first + math.ceil((live.left / max(speeds) + setup) / self.problem.slot_hours)
        due = self.problem.clock.deadline(live.job.deadline)
        return min(self.problem.slots, max(due - 1, soonest))


class _Free:
    """Devices of one slot that are not taken, within quotas."""

    def __init__(self, problem: Problem, count: np.ndarray):
        self.count, self.quota = count.copy(), dict(problem.quotas)
        self.group = [pool.quota_group for pool in problem.pools]

    def room(self, p: int) -> int:
        group = self.group[p]
        return int(self.count[p] if group is None else min(self.count[p], self.quota[group]))

    def take(self, p: int, n: int) -> bool:
        """Whether n devices of pool p were left, which are then taken."""
        if self.room(p) < n:
            return False
        self.count[p] -= n
        group = self.group[p]
        if group is not None:
            self.quota[group] -= n
        return True
