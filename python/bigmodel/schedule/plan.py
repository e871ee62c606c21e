"""The answer: who runs where and when, what it costs, and how good that is proven to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigmodel.schedule import files, plot, rules, text
from bigmodel.schedule.problem import Objective, Problem, When
from bigmodel.schedule.rules import Account, Run

if TYPE_CHECKING:
    import pandas as pd

    from bigmodel.schedule.changes import Changes


@dataclass(frozen=True)
class StageResult:
    """One stage of the objective: the value reached, the proven bound, and (value - bound) / |value|."""

    measure: str
    value: float
    bound: float

    @property
    def gap(self) -> float:
        if self.value - self.bound <= 1e-9 * max(1.0, abs(self.value)):
            return 0.0
        return (self.value - self.bound) / abs(self.value) if self.value else np.inf

    @property
    def proven(self) -> str:
        """Bound and gap in words."""
        return f"at least {self.bound:.4g} (gap {self.gap:.2%})" if np.isfinite(self.gap) else "nothing proven yet"

    def to_dict(self) -> dict[str, Any]:
        """JSON has no infinity: what is not proven is null."""
        proven = {"bound": self.bound, "gap": self.gap} if np.isfinite(self.gap) else {"bound": None, "gap": None}
        return {"measure": self.measure, "value": self.value, **proven}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageResult:
        return cls(data["measure"], data["value"], -np.inf if data["bound"] is None else data["bound"])


@dataclass(frozen=True, eq=False)
class Plan:
    """allocation: devices, integers of shape (jobs, pools, slots), in the order of problem.jobs and problem.pools.

    problem has its replicas written out. status is a sentence; complete says whether the search ended by itself, so
    that the same input and seed give the same plan; interrupted, whether Ctrl-C ended it. notes: what a reader should
    know, such as spot and deadlines. Plans are equal if they would be written alike.
    """

    problem: Problem
    allocation: np.ndarray
    status: str
    stages: tuple[StageResult, ...]
    complete: bool
    seconds: float
    notes: tuple[str, ...] = ()
    past: tuple[dict[str, Any], ...] = ()  # rows of runs before Problem.now
    moves: tuple[str, ...] = ()  # what re-planning moved, and what that costs
    softened: tuple[str, ...] = ()  # jobs whose hard deadlines re-planning has given up
    wished: Objective | None = None  # the objective that was asked for, where giving them up has changed it
    shadow: np.ndarray | None = field(default=None, repr=False)  # price of capacity, per device and slot
    interrupted: bool = False

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Plan) else NotImplemented

    @cached_property
    def account(self) -> Account:
        return rules.check(self.problem, self.allocation)

    @property
    def value(self) -> float:
        """The first stage's measure."""
        return self.stages[0].value

    @property
    def bound(self) -> float:
        return self.stages[0].bound

    @property
    def gap(self) -> float:
        return self.stages[0].gap

    @property
    def cost(self) -> float:
        """Currency, from Problem.now on; without fixed costs and without the value of dropped jobs."""
        return sum(job.cost for job in self.account.jobs)

    @property
    def stability_cost(self) -> float:
        """What moving running jobs weighs in the objective besides their restarts; in no budget and no bill."""
        return rules.stability_cost(self.problem, self.account.jobs)

    @property
    def fixed_cost(self) -> float:
        return sum(pool.fixed_cost for pool in self.problem.pools)

    @property
    def carbon(self) -> float:
        """Kilograms of CO2."""
        return self.account.measure("carbon")

    @property
    def dropped(self) -> list[str]:
        return [self.problem.jobs[j].name for j in self.account.dropped]

    @property
    def start(self) -> dict[str, int]:
        """First slot of each planned job."""
        return {name: job.start for name, job in self._named() if job.start is not None}

    @property
    def finish(self) -> dict[str, int]:
        """The slot after the last of each planned job."""
        return {name: job.finish for name, job in self._named() if job.finish is not None}

    @property
    def runs(self) -> dict[str, list[Run]]:
        return {name: job.runs for name, job in self._named()}

    @property
    def cost_by_job(self) -> dict[str, float]:
        return {name: job.cost for name, job in self._named()}

    @property
    def cost_by_owner(self) -> dict[str, float]:
        costs: dict[str, float] = {}
        for job, done in zip(self.problem.jobs, self.account.jobs, strict=True):
            costs[job.owner] = costs.get(job.owner, 0.0) + done.cost
        return costs

    @property
    def cost_by_pool(self) -> dict[str, float]:
        total = np.zeros(len(self.problem.pools))
        for job in self.account.jobs:
            total += 0.0 if job.cost_by_pool is None else job.cost_by_pool
        return {pool.name: float(cost) for pool, cost in zip(self.problem.pools, total, strict=True)}

    @property
    def utilisation(self) -> dict[str, float]:
        """Device-slots used over those there are, by pool, from Problem.now on."""
        now = self.problem.now
        used, there = self.allocation[:, :, now:].sum(axis=(0, 2)), self.problem.count[:, now:].sum(axis=1)
        return {pool.name: float(u / max(n, 1)) for pool, u, n in zip(self.problem.pools, used, there, strict=True)}

    def _named(self):
        return zip([job.name for job in self.problem.jobs], self.account.jobs, strict=True)

    # --- views --------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One row per run and pool: job, owner, pool, devices, first, last, begins, ends, hours, lost_hours."""
        clock, rows = self.problem.clock, []
        for job, done in zip(self.problem.jobs, self.account.jobs, strict=True):
            for run in done.runs:
                for p, devices in run.devices:
                    rows.append(
                        {
                            "job": job.name,
                            "owner": job.owner,
                            "pool": self.problem.pools[p].name,
                            "devices": devices,
                            "first": run.first,
                            "last": run.last,
                            "begins": clock.begins(run.first).isoformat(),
                            "ends": clock.begins(run.last).isoformat(),
                            "hours": run.hours,
                            "lost_hours": run.lost_hours,
                        }
                    )
        return rows

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas.DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows())

    def table(self) -> str:
        return text.plan(self)

    def gantt(self, path: str | Path) -> None:
        """Draws the plan into a .png, .svg or self-contained .html file.

        Raises:
            ValueError: another suffix. ImportError: matplotlib is missing (.png and .svg).
        """
        plot.gantt(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "stages": [stage.to_dict() for stage in self.stages],
            "cost": self.cost,
            "fixed_cost": self.fixed_cost,
            "stability_cost": self.stability_cost,
            "carbon_kg": self.carbon,
            "dropped": self.dropped,
            "notes": list(self.notes),
            "past": list(self.past),
            "moves": list(self.moves),
            "cost_by_job": self.cost_by_job,
            "cost_by_owner": self.cost_by_owner,
            "cost_by_pool": self.cost_by_pool,
            "utilisation": self.utilisation,
            "runs": self.rows(),
            "softened": list(self.softened),
            "wished": None if self.wished is None else files.to_dict(self.wished),
            "shadow": None if self.shadow is None else self.shadow.tolist(),
            "problem": files.to_dict(self.problem),
        }

    def to_json(self) -> str:
        """`to_dict` and its checksum; columns of CSV files are written out."""
        data = self.to_dict()
        return json.dumps(data | {"sha256": _checksum(json.dumps(data))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: no such text, one that was changed since, or a plan that breaks a rule; one sentence.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"plan: is no JSON: {error}.") from None
        if not isinstance(data, dict) or "sha256" not in data:
            raise ValueError("plan: has no sha256; a plan is what Plan.to_json and `bigmodel plan --json` write.")
        if data["sha256"] != _checksum(text):
            raise ValueError("plan: was changed after it was written, so nothing that it claims can be relied on.")
        problem = files.from_dict(data["problem"])
        plan = cls(
            problem=problem,
            allocation=_allocation(problem, [*data["past"], *data["runs"]]),
            status=data["status"],
            stages=tuple(StageResult.from_dict(stage) for stage in data["stages"]),
            complete=data["complete"],
            seconds=data["seconds"],
            notes=tuple(data["notes"]),
            past=tuple(data["past"]),
            moves=tuple(data["moves"]),
            softened=tuple(data["softened"]),
            wished=None if data["wished"] is None else files.build(Objective, data["wished"], "wished"),
            shadow=None if data["shadow"] is None else np.array(data["shadow"]),
        )
        if plan.account.violations:
            raise ValueError(f"plan: breaks a rule: {plan.account.violations[0]}.")
        return plan

    def diff(self, other: Plan) -> str:
        """What `other` does differently from the later plan's `now` on, one line per job, and what that costs."""
        return text.diff(self, other)

    def prices(self) -> list[str]:
        """What one more device of each pool would save, by the relaxation's prices of capacity: an upper estimate."""
        return text.prices(self)

    def replan(self, now: When, changes: Changes | Mapping[str, Any] | None = None, **options) -> Plan:
        """Plans again from `now`, a slot or an ISO time, keeping the past; see bigmodel.schedule.replanning.replan."""
        from bigmodel.schedule import replanning

        return replanning.replan(self, now, changes, **options)


def _checksum(text: str) -> str:
    """Of a plan's JSON without its checksum, however it is laid out."""
    data = {key: value for key, value in json.loads(text, parse_int=float).items() if key != "sha256"}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _allocation(problem: Problem, rows: list[dict[str, Any]]) -> np.ndarray:
    jobs = {job.name: j for j, job in enumerate(problem.jobs)}
    pools = {pool.name: p for p, pool in enumerate(problem.pools)}
    table = np.zeros((len(jobs), len(pools), problem.slots), dtype=np.int64)
    for row in rows:
        if row["job"] in jobs:
            table[jobs[row["job"]], pools[row["pool"]], row["first"] : row["last"]] = row["devices"]
    return table
