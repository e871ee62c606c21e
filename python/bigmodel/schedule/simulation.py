"""Replays a trace of prices and interruptions against a policy, one slot after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule import rates, validate
from bigmodel.schedule.capacity import Free
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
    """cost: currency from Problem.now on, with the value of jobs that were left out; of BOUND, a lower bound on it.
    missed: jobs late or unfinished, so also those with a value that were left out. interruptions: runs that a pool's
    end cut."""

    policy: str
    cost: float
    missed: tuple[str, ...]
    interruptions: int
    seconds: float


def trace(problem: Problem, seed: int) -> Trace:
    """Spot prices that revert to a daily cycle, and spot pools up for 1 to 24 hours and down for 1 to 6."""
    validate.whole(seed, "trace: seed", most=2**63 - 1)
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
    it starts again. Replay begins at Problem.now, with the jobs as they stand there. A job with a value that is never
    finished costs it. Nobody is held back by budgets, and the stability of running jobs is in no cost.

    Raises:
        ValueError: an unknown policy, a trace of another shape, with what is no price or count, a job that mixes pools,
            or one without a fallback.
    """
    validate.choice(policy, "simulate: policy", (*POLICIES, BOUND))
    _check(problem, trace)
    if policy == BOUND:
        begin = time.monotonic()
        return Outcome(policy, clairvoyant(problem, trace), (), 0, time.monotonic() - begin)
    return _Replay(problem, trace, policy, seed).run()


def clairvoyant(problem: Problem, trace: Trace, seconds: float = 10.0, gap: float = 0.01) -> float:
    """A lower bound on the cost of any policy that meets every deadline, knowing the whole trace."""
    replay = _Replay(problem, trace, BOUND)
    replay.interrupt(problem.now)
    known = _with(replay.standing(range(len(replay.jobs)), problem.now), trace.price, trace.count, calm=True)
    # The trace may break what the rules may not: a run that is not preemptible, or shorter than min_run.
    down = set(np.nonzero(np.diff(trace.count[:, problem.now :]) < 0)[0])
    jobs = [
        replace(job, preemptible=True, min_run=1) if any(rate[p] for p in down) else job
        for job, rate in zip(known.jobs, replay.rate, strict=True)
    ]
    known = replace(known, jobs=tuple(jobs), stability=0.0)
    inst = build(known, stage_for(known, {"cost": 1.0}))
    return Search(inst, shared(), time.monotonic() + seconds, gap).run().bound


def _check(problem: Problem, trace: Trace) -> None:
    if not isinstance(trace, Trace):
        raise ValueError(f"simulate: trace: must be a Trace, got {trace!r}.")
    shape = (len(problem.pools), problem.slots)
    for name, table in vars(trace).items():
        path = f"simulate: trace.{name}"
        if np.shape(table) != shape:
            raise ValueError(f"{path} has shape {np.shape(table)}, but pools and slots are {shape}.")
        if not isinstance(table, np.ndarray) or table.dtype.kind not in "iuf":
            raise ValueError(f"{path} must be an array of numbers.")
        whole = name != "count" or table == np.floor(table)
        if not (np.isfinite(table) & (table >= 0) & whole).all():
            raise ValueError(f"{path} must hold finite{' whole' if name == 'count' else ''} numbers, none below 0.")


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


def _unlimited(problem: Problem) -> Problem:
    jobs = tuple(replace(job, budget=None) for job in problem.jobs)
    return replace(problem, jobs=jobs, budget=None, budgets={})


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
    def __init__(self, problem: Problem, trace: Trace, policy: str, seed: int = 0):
        self.problem, self.trace, self.policy, self.seed = _unlimited(problem.expanded), trace, policy, seed
        problem = self.problem
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
        self.jobs = [self._live(j, job) for j, job in enumerate(problem.jobs)]

    def _live(self, j: int, job: Job) -> _Live:
        live, running = _Live(job, job.work - job.done, started=job.started), job.running
        if running is not None:
            at = self.problem.pool_index(running.pool), running.devices
            if at[1] in self.rate[j][at[0]]:
                live.at, live.slots, live.setup = at, running.slots, running.setup_left
        return live

    def run(self) -> Outcome:
        begin = time.monotonic()
        for slot in range(self.problem.now, self.problem.slots):
            self.interrupt(slot)
            wanted = getattr(self, f"_{self.policy}")(slot)
            self._step(slot, wanted)
        self.cost += sum(live.job.value or 0.0 for live in self.jobs if live.finish is None)
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

    def interrupt(self, slot: int) -> None:
        """Ends the runs whose devices the trace takes away."""
        free = Free(self.problem, self.trace.count[:, slot, None])
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
        deadline = self.jobs[j].job.deadline
        return deadline is not None and self.problem.clock.deadline(deadline) - slot <= self._steady_slots(j) + 1

    def _steady_slots(self, j: int) -> int:
        """Slots that the job takes on steady devices, set up anew as slowly as on any of them."""
        live, pools = self.jobs[j], self._fallback()
        fastest = max(rate for p in pools for rate in self.rate[j][p].values())
        setup = max(self.problem.pools[p].startup_hours for p in pools) + live.job.restart
        return math.ceil((live.left / fastest + setup) / self.problem.slot_hours)

    def _goes_on(self, j: int) -> bool:
        """Whether the job's run may not be broken off: it is not preemptible, or shorter than min_run yet."""
        live = self.jobs[j]
        return live.at is not None and (not live.job.preemptible or live.slots < live.job.min_run)

    def _take(self, slot: int, order: list[int], allowed, keep=()) -> dict[int, tuple[int, int]]:
        """`keep`, and what may not be broken off, goes on; then each job in turn takes the pool that does its work
        cheapest now, and there all it can; the urgent first."""
        free = Free(self.problem, self.trace.count[:, slot, None])
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
        count[:, slot] = self.trace.count[:, slot]
        now = self.standing(waiting, slot)
        # A deadline that cannot be met is kept out of the way: the job then runs as soon as it can.
        pairs = zip(now.jobs, waiting, strict=True)
        jobs = tuple(replace(job, deadline=self._reachable(j, slot), soft=False) for job, j in pairs)
        return _with(replace(now, jobs=jobs), price, count)

    def standing(self, chosen: Sequence[int], slot: int) -> Problem:
        """The problem of some jobs from a slot on, as they stand."""
        jobs = []
        names = {self.jobs[j].job.name for j in chosen}
        for j in chosen:
            live, job = self.jobs[j], self.jobs[j].job
            running = None
            if live.at is not None:
                name = self.problem.pools[live.at[0]].name
                running = Running(pool=name, devices=live.at[1], slots=live.slots, setup_left=live.setup)
            after = tuple(name for name in job.after if name in names)
            done = job.work - live.left
            jobs.append(replace(job, done=done, started=live.started, running=running, after=after))
        return replace(self.problem, now=slot, jobs=tuple(jobs))

    def _reachable(self, j: int, slot: int) -> int | None:
        """The deadline less a slot to spare for an interruption, or the soonest end that can still be reached."""
        job = self.jobs[j].job
        if job.deadline is None:
            return None
        soonest = max(slot, self.problem.clock.release(job.release)) + self._steady_slots(j)
        return min(self.problem.slots, max(self.problem.clock.deadline(job.deadline) - 1, soonest))
