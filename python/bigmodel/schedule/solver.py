"""`solve`: the objective's stages one after the other, and a plan that has passed the rules."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bigmodel.schedule import cures, explain, rates, rules, validate
from bigmodel.schedule.bisection import Bisection
from bigmodel.schedule.errors import Infeasible, Unknown
from bigmodel.schedule.instance import Instance, Limit, Stage, build, stage_for
from bigmodel.schedule.plan import Plan, StageResult
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.search import Search
from bigmodel.schedule.weighing import Weighing
from bigmodel.schedule.worker import Lost, shared

SEPARABLE = ("cost", "carbon", "lateness")

TIME_LIMIT = 30.0  # seconds
_NEAR = 0.5  # seconds before the limit from which it is what ended a search
_RESUMED = 0.2  # seconds that must be left for a bisection to go on
_LONGEST = 1e7  # seconds that a wait for the solver's process can be given
Progress = Callable[[float, float, float], None]  # incumbent, bound, seconds


def solve(
    problem: Problem,
    *,
    time_limit: float = TIME_LIMIT,
    gap: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
    explain: bool = True,
    backend: str = "highs",
) -> Plan:
    """Plans a problem.

    Args:
        time_limit: seconds, held to 0.5 s; on Ctrl-C the best plan so far is returned likewise.
        gap: relative distance between plan and bound at which the search stops.
        seed: of the neighbourhood search. The same input and seed give the same plan unless time ran out.
        progress: called with (incumbent, bound, seconds) when either moves.
        explain: look for causes and cures of infeasibility.
        backend: "highs", the only one yet.

    Raises:
        Infeasible: proven; with causes and cures. Unknown: time ran out, or the solver's process was lost,
            with neither a plan nor a proof.
        ValueError: an argument out of range.
    """
    if not isinstance(problem, Problem):
        raise ValueError(f"solve: problem must be a bigmodel.schedule.Problem, got {problem!r}.")
    if backend != "highs":
        raise ValueError(f"solve: backend is {backend!r}; the only one is 'highs'.")
    if not isinstance(time_limit, (int, float, np.number)) or not time_limit > 0:
        raise ValueError(f"solve: time_limit is {time_limit!r}; it must be a number of seconds above 0.")
    if not isinstance(gap, (int, float, np.number)) or not gap >= 0:
        raise ValueError(f"solve: gap is {gap!r}; it must be a number, at least 0.")
    validate.whole(seed, "solve: seed", most=2**63 - 1)
    return _Solve(problem.expanded, min(time_limit, _LONGEST), gap, seed, progress, explain).plan()


class _Solve:
    def __init__(self, problem: Problem, time_limit: float, gap: float, seed: int, progress, explain: bool):
        self.problem, self.gap, self.seed, self.explain = problem, gap, seed, explain
        self.begin = time.monotonic()
        self.end = self.begin + time_limit
        self.progress = progress
        self.best: dict[int, tuple] | None = None
        self.results: list[StageResult] = []
        self.cut = False
        self.stopped = ""  # what ended the search from outside; {} for when
        self.interrupted = False
        self.shadow: np.ndarray | None = None
        self.unproven: tuple[int, Bisection, float] | None = None  # a stage that time cut off: its search, when

    def plan(self) -> Plan:
        causes = explain.necessary(self.problem)
        if causes:
            self._infeasible(causes)
        try:
            self._stages()
        except (KeyboardInterrupt, Lost) as error:
            self._stop(error)
        if self.best is None:
            if self.stopped:
                why = f"no plan was found, and none was proven impossible: {self.stopped.format('')}."
                raise Unknown(why, interrupted=self.interrupted)
            raise Unknown("no plan was found in the time given, and none was proven impossible; give more time.")
        return self._finished()

    def _stop(self, error: BaseException) -> None:
        self.interrupted = isinstance(error, KeyboardInterrupt)
        self.stopped = "interrupted{}" if self.interrupted else f"stopped{{}}, since {error}"

    def _infeasible(self, causes: list[explain.Cause]) -> None:
        if not self.explain:
            raise Infeasible([cause.text for cause in causes] + explain.kept(self.problem))
        raise cures.infeasible(self.problem, causes, self.end)

    # --- stages -------------------------------------------------------------------------------------------------------

    def _stages(self) -> None:
        objective = self.problem.objective
        if objective.weights:
            self._weighted(objective.weights)
            return
        order = objective.order
        if {"fairness", "owner_fairness"} & set(order) and "cost" not in order:
            order = (*order, "cost")  # among the fairest, the cheapest
        self._ordered(order, 0, stage_for(self.problem, {"cost": 1.0}))
        while self.unproven is not None and not self.stopped and time.monotonic() < self.end - _RESUMED:
            self._resume(order, *self.unproven)

    def _ordered(self, order: tuple[str, ...], first: int, stage: Stage) -> None:
        """Stages from `first` on, each with its share of the time that is left."""
        for index in range(first, len(order)):
            end = time.monotonic() + (self.end - time.monotonic()) / (len(order) - index)
            if order[index] in SEPARABLE:
                stage = self._separable(stage, order[index], end)
            else:
                stage = self._bottleneck(stage, order[index], end)
            if self.best is None or self.stopped:
                return

    def _resume(self, order: tuple[str, ...], index: int, bisection: Bisection, ended: float) -> None:
        """Gives an unproven bisection what the later stages left of the time; they start again from a better plan."""
        value, now = bisection.value, time.monotonic()
        self._bisect(bisection, max(self.end - (now - ended), (now + self.end) / 2))
        self.results[index] = StageResult(order[index], bisection.value, bisection.bound)
        since = time.monotonic()
        if bisection.value == value:
            ended += since - now
        else:
            self.best, ended = bisection.best, since
            del self.results[index + 1 :]
            self._ordered(order, index + 1, replace(bisection.stage, ends=bisection.ends))
        self.unproven = None if bisection.ended else (index, bisection, ended)

    def _separable(self, stage: Stage, measure: str, end: float) -> Stage:
        stage = replace(stage, weights={measure: 1.0})
        self._search(build(self.problem, stage), end, measure)
        if self.best is None:
            return stage
        weights = {measure: 1.0} | ({"value": 1.0} if measure == "cost" else {})
        # A little more than what was reached, against rounding; far inside the stage's proven gap.
        most = self.results[-1].value * (1 + 1e-7) + 1e-9
        members = tuple(range(len(self.problem.jobs)))
        return replace(stage, limits=(*stage.limits, Limit(measure, members, weights, most)))

    def _bottleneck(self, stage: Stage, measure: str, end: float) -> Stage:
        bisection = Bisection(self.problem, stage, measure, shared(), gap=self.gap, seed=self.seed, start=self.best)
        self._bisect(bisection, end)
        if bisection.infeasible and self.best is None:
            self._infeasible([explain.together(self.problem)])
        if bisection.best is None:
            return stage
        self.best = bisection.best
        self.results.append(StageResult(measure, bisection.value, bisection.bound))
        if self.unproven is None and not bisection.ended:
            self.unproven = len(self.results) - 1, bisection, time.monotonic()
        return replace(stage, ends=bisection.ends)

    def _bisect(self, bisection: Bisection, end: float) -> None:
        bisection.run(end)
        self.cut |= bisection.cut
        if bisection.stopped is not None:
            self._stop(bisection.stopped)

    def _weighted(self, weights: dict[str, float]) -> None:
        """Separable measures are priced; branch and bound on the values of the others."""
        separable = {name: weights[name] for name in SEPARABLE if weights.get(name)}
        others = {name: weights[name] for name in weights if name not in SEPARABLE and weights[name]}
        if not others:
            stage = stage_for(self.problem, separable or {"cost": 0.0})
            self._search(build(self.problem, stage), self.end, "weighted")
            return
        found = Weighing(
            self.problem, separable, others, shared(), gap=self.gap, seed=self.seed, report=self._report
        ).run(self.end)
        self.cut |= found.cut
        if found.stopped is not None:
            self._stop(found.stopped)
        if found.infeasible and found.best is None:
            self._infeasible([explain.together(self.problem)])
        if found.best is None:
            return
        self.best = found.best
        self.results = [StageResult("weighted", found.value, found.bound)]
        if found.prices is not None and separable.get("cost"):
            self.shadow = found.prices.capacity / separable["cost"]

    def _search(self, inst: Instance, end: float, measure: str) -> None:
        search = self._run(inst, end, self.best)
        if search.infeasible and self.best is None and search.best is None:
            self._infeasible([explain.together(self.problem)])
        if search.best is not None:
            self.best = search.best
            self.results.append(StageResult(measure, search.value, search.bound))

    def _report(self, value: float, bound: float) -> None:
        if self.progress is not None:
            self.progress(value, bound, time.monotonic() - self.begin)

    def _run(self, inst: Instance, end: float, start: dict[int, tuple] | None) -> Search:
        search = Search(inst, shared(), end, self.gap, self.seed, self._report)
        try:
            search.run(start)
        except (KeyboardInterrupt, Lost) as error:
            self._stop(error)
        self.cut |= search.cut
        if inst.stage.weights.get("cost"):
            self.shadow = search.prices.capacity / inst.stage.weights["cost"]
        return search

    # --- the answer ---------------------------------------------------------------------------------------------------

    def _allocation(self, best: dict[int, tuple]) -> np.ndarray:
        problem = self.problem
        table = np.zeros((len(problem.jobs), len(problem.pools), problem.slots), dtype=np.int64)
        for j, use in best.items():
            for slot, p, n in use:
                table[j, p, slot] += n
        return table

    def _finished(self) -> Plan:
        assert self.best is not None
        allocation = rules.trimmed(self.problem, self._allocation(self.best))
        account = rules.check(self.problem, allocation)
        if account.violations:
            raise RuntimeError(f"solve: the plan found breaks a rule and is not returned: {account.violations[0]}.")
        results = tuple(self._measured(account, result) for result in self.results)
        seconds = time.monotonic() - self.begin
        status = _status(results, self.stopped, self.cut, self.gap, seconds, self.end - self.begin)
        complete = not (self.cut or self.stopped)
        notes = _notes(account)
        return Plan(
            self.problem,
            allocation,
            status,
            results,
            complete,
            seconds,
            notes,
            shadow=self.shadow,
            interrupted=self.interrupted,
        )

    def _measured(self, account: rules.Account, result: StageResult) -> StageResult:
        """The stage's value as the rules find it in the plan that is returned."""
        weights = self.problem.objective.weights if result.measure == "weighted" else {result.measure: 1.0}
        value = sum(weight * account.measure(name) for name, weight in weights.items())
        return StageResult(result.measure, float(value), float(min(result.bound, value)))


def _status(results: tuple[StageResult, ...], stopped: str, cut: bool, gap: float, seconds: float, limit: float) -> str:
    first = results[0]
    if not np.isfinite(first.gap):
        quality = "a plan, with no bound proven"
    elif first.gap <= 1e-6:
        quality = "optimal"
    elif first.gap <= gap:
        quality = f"within {first.gap:.2%} of the best possible, as asked"
    else:
        quality = f"within {first.gap:.2%} of the best possible, short of the {gap:.2%} asked"
    if stopped:
        return f"{quality}; {stopped.format(f' after {seconds:.1f} s')}"
    if cut and seconds > limit - _NEAR:
        return f"{quality}; time ran out after {seconds:.1f} s, so another run may end elsewhere"
    if cut:
        return f"{quality}; it took {seconds:.1f} s and cut some steps short, so another run may end elsewhere"
    over = "" if first.gap <= max(gap, 1e-6) else ", with nothing left to try"
    return f"{quality}; the search ended after {seconds:.1f} s{over}"


def _notes(account: rules.Account) -> tuple[str, ...]:
    """Deadlines that rest on spot devices, soft ones that are missed or weigh nothing, and rates that nobody has
    measured."""
    problem, notes, assumed = account.problem, [], []
    clock, objective = problem.clock, problem.objective
    for job, done in zip(problem.jobs, account.jobs, strict=True):
        used = {p for run in done.runs for p, _ in run.devices}
        spot = [problem.pools[p].name for p in sorted(used) if problem.pools[p].interruptions_per_hour > 0]
        if spot and job.deadline is not None and not job.soft:
            notes.append(f"{job.name}: the deadline is met in expectation only, since it runs on {', '.join(spot)}")
        late = rules.late_hours(problem, job, done.finish) if done.finish is not None else 0.0
        if late:
            since = f", counted from {clock.label(clock.deadline(job.deadline))}" if clock.rounds(job.deadline) else ""
            notes.append(f"{job.name}: ends {late:g} h after its deadline, which is soft{since}")
        held = [(problem.pools[p].name, devices) for run in done.runs for p, devices in run.devices]
        if any(point.source == "assumed" for at in held for point in rates.behind(job, *at)):
            assumed.append(job.name)
    soft = [job.name for job in problem.jobs if job.soft]
    weighed = objective.weights.get("lateness") if objective.weights else "lateness" in objective.order
    if soft and not weighed:
        notes.append(f"lateness is not in the objective, so soft deadlines weigh nothing: {', '.join(soft)}")
    if assumed:
        notes.append(f"throughput is assumed, not measured: {', '.join(assumed)}")
    return tuple(notes)
