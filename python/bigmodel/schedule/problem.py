"""What there is to plan: pools of devices, jobs, and the horizon. Plain data; rules are in docs/planner.md.

Units everywhere: hours, device-hours, the problem's one currency, GiB, kW, gCO2/kWh, and work in samples or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

OWNERSHIPS = ("owned", "reserved", "on_demand", "spot")
BILLINGS = ("slot", "second")
UNITS = ("samples", "tokens")
SOURCES = ("measured", "assumed")
MEASURES = ("cost", "makespan", "lateness", "fairness", "owner_fairness", "carbon")

# A number, 24 numbers (one per local hour), a list of {from, to, value}, {slots = [...]}, or {csv, column, time}.
PerSlot = Any
# A slot number, or an ISO 8601 time; one without a UTC offset is local to Problem.tz.
When = int | str


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Devices of one kind that are bought together.

    count: devices there are in each slot. price: per device-hour. fixed_cost: paid whatever runs, shown apart.
    billing: "slot" pays whole slots; "second" pays a job's last slot pro rata. node_size: devices of one node; a larger
    count must be a multiple of it. quota_group: a key of Problem.quotas, shared by pools. startup_hours: lost and paid
    at every start. memory: GiB per device. interruptions_per_hour: of spot. kw: per device, before pue. carbon: gCO2
    per kWh. partition, gres, accelerator, queue: names that the emitted files use.
    """

    name: str
    count: PerSlot
    price: PerSlot = 0.0
    kind: str = "gpu"
    model: str = ""
    region: str = ""
    ownership: str = "on_demand"
    fixed_cost: float = 0.0
    billing: str = "slot"
    node_size: int | None = None
    quota_group: str | None = None
    startup_hours: float = 0.0
    memory: float | None = None
    interruptions_per_hour: float = 0.0
    kw: float = 0.0
    carbon: PerSlot = 0.0
    pue: float = 1.0
    partition: str | None = None
    gres: str | None = None
    accelerator: str | None = None
    queue: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A point of a job's throughput: `rate` samples or tokens per second on `devices` devices of `pool`."""

    pool: str
    devices: int
    rate: float
    source: str = "assumed"


@dataclass(frozen=True, kw_only=True)
class Running:
    """What a job is doing at Problem.now: for how many slots, and the set-up hours it has still to lose."""

    pool: str
    devices: int
    slots: int
    setup_left: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work to be done, in `unit`, and what may be done with it.

    throughput: points per pool; between two points (0 devices give 0) a rate is interpolated, above the last there is
    none. counts: device counts allowed, by default those of the points. deadline: the job ends by then, or, if `soft`,
    pays priority x hours late in the objective "lateness". min_run: slots that a run lasts at least, unless it is the
    last. checkpoint_every, restart: hours. after: names of jobs that end before this one starts. budget: most that the
    job may cost. value: lost if the job is dropped; None: it may not be dropped. replicas: independent copies.
    mix_pools: any number of devices of several pools in a slot, rates adding. data_gb, command, env, image: for
    emission. done, started, running, spent: where a job stands that began before Problem.now.
    """

    name: str
    work: float
    throughput: tuple[Rate, ...]
    unit: str = "tokens"
    counts: tuple[int, ...] | None = None
    memory: float = 0.0
    release: When = 0
    deadline: When | None = None
    soft: bool = False
    priority: float = 1.0
    owner: str = ""
    preemptible: bool = True
    min_run: int = 1
    checkpoint_every: float = 0.0
    restart: float = 0.0
    after: tuple[str, ...] = ()
    budget: float | None = None
    value: float | None = None
    replicas: int = 1
    mix_pools: bool = False
    data_gb: float = 0.0
    command: str = ""
    env: dict[str, str] = field(default_factory=dict)
    image: str = ""
    done: float = 0.0
    started: bool = False
    running: Running | None = None
    spent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to minimise: names of MEASURES one after the other, or `weights` in currency per unit of each."""

    order: tuple[str, ...] = ("cost",)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """`slots` slots of `slot_hours` hours of elapsed time from `start`, pools and jobs.

    tz: an IANA zone that labels the slots and gives the local hours of 24-hour profiles. quotas: most devices in use in
    a quota group. budget, budgets: most that all jobs, or an owner's, may cost. stability: currency that moving a
    running job costs besides its restart. now: the first slot that is still open; earlier ones are history.

    Raises:
        ValueError: anything inconsistent, as one sentence that begins with its path, such as jobs[2].deadline.
    """

    slots: int
    slot_hours: float = 1.0
    start: str = "2000-01-01T00:00"
    tz: str = "UTC"
    pools: tuple[Pool, ...] = ()
    jobs: tuple[Job, ...] = ()
    quotas: dict[str, int] = field(default_factory=dict)
    budget: float | None = None
    budgets: dict[str, float] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    stability: float = 0.0
    now: int = 0
    currency: str = "USD"
    folder: str = field(default=".", repr=False, compare=False)  # where relative CSV paths start

    def __post_init__(self) -> None:
        for name in ("pools", "jobs"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        from bigmodel.schedule import validate

        validate.problem(self)

    @cached_property
    def clock(self):
        from bigmodel.schedule.clock import Clock

        return Clock(self.start, self.tz, self.slots, self.slot_hours)

    @cached_property
    def count(self):
        """Devices, an integer array of shape (pools, slots)."""
        from bigmodel.schedule import series

        return series.counts(self)

    @cached_property
    def price(self):
        """Currency per device-hour, shape (pools, slots)."""
        from bigmodel.schedule import series

        return series.averages(self, "price")

    @cached_property
    def grams(self):
        """gCO2 per kWh, shape (pools, slots)."""
        from bigmodel.schedule import series

        return series.averages(self, "carbon")

    @cached_property
    def carbon(self):
        """Kilograms of CO2 per device-hour, shape (pools, slots): kW x PUE x gCO2/kWh / 1000."""
        import numpy as np

        kw = np.array([pool.kw * pool.pue for pool in self.pools])
        return self.grams * kw[:, None] / 1000.0

    @cached_property
    def expanded(self) -> Problem:
        """This problem with every job of several replicas written out as name-1, name-2, ..., each with its number in
        the variable BIGMODEL_REPLICA of its env."""
        if all(job.replicas == 1 for job in self.jobs):
            return self
        names = {job.name: replica_names(job) for job in self.jobs}
        jobs = [
            replace(
                job,
                name=name,
                replicas=1,
                after=tuple(copy for before in job.after for copy in names[before]),
                env={"BIGMODEL_REPLICA": str(number)} | job.env if job.replicas > 1 else job.env,
            )
            for job in self.jobs
            for number, name in enumerate(names[job.name], 1)
        ]
        return replace(self, jobs=tuple(jobs))

    def pool_index(self, name: str) -> int:
        return [pool.name for pool in self.pools].index(name)

    def job_index(self, name: str) -> int:
        return [job.name for job in self.jobs].index(name)

    def window(self, job: Job) -> tuple[int, int]:
        """The first slot in which a job may run and the slot before which it must end (soft deadlines bind nothing)."""
        first = max(self.now, self.clock.release(job.release))
        last = self.slots if job.soft or job.deadline is None else self.clock.deadline(job.deadline)
        return first, min(last, self.slots)


def replica_names(job: Job) -> list[str]:
    return [job.name] if job.replicas == 1 else [f"{job.name}-{copy + 1}" for copy in range(job.replicas)]
