"""Makespan and fairness: in an order and weighted, against brute force, and what is proven of them."""

import time
from dataclasses import replace

import pytest
import second_checker as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigmodel import schedule
from bigmodel.schedule import Job, Objective, Pool, Problem, Rate, bisection, feasibility, instance, solver, worker
from bigmodel.schedule.bottleneck import Bottleneck
from bigmodel.schedule.plan import StageResult

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MEASURES = ("makespan", "fairness", "owner_fairness")
POINT = (Rate(pool="p", devices=1, rate=1 / 3600),)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_best_deadline_is_none_of_a_few(measure):
    """One job of a slot: the price of slot 8 is 0.1 lower than that of slot 7, and it ends an hour later."""
    price = [20.0, *[19.0] * 6, 10.0, *[9.9] * 11, 1.0]
    problem = Problem(
        slots=20, pools=(Pool(name="p", count=2, price={"slots": price}),),
        jobs=(Job(name="a", work=1.0, throughput=POINT),), objective=Objective(weights={"cost": 1.0, measure: 1.0}),
    )  # fmt: skip
    plan = schedule.solve(problem, gap=0.0, time_limit=60)
    assert plan.value == pytest.approx(18.0) and plan.gap <= 1e-6 and plan.status.startswith("optimal; the search")


@given(st.integers(10**6, 10**9), st.sampled_from(MEASURES), st.sampled_from([0.1, 1.0, 5.0]))
@FEW
def test_weighted_measures_equal_brute_force(seed, measure, weight):
    problem, _ = reference.random_problem(seed, tiny=True)
    weights = {"cost": 1.0, measure: weight, "makespan": 0.3}
    problem = replace(problem, objective=Objective(weights=weights))
    (best,) = reference.brute_force(problem)
    plan = schedule.solve(problem, gap=0.0, time_limit=60)
    assert reference.broken(problem, plan.allocation)[0] == [] and plan.gap <= 2e-6
    assert reference.isclose(plan.value, best)


@given(st.integers(10**6, 10**9))
@settings(FEW, max_examples=5)
def test_the_least_slowdown_of_owners_equals_brute_force(seed):
    problem, _ = reference.random_problem(seed, tiny=True)
    problem = replace(problem, objective=Objective(order=("owner_fairness",)))
    plan, best = schedule.solve(problem, gap=0.0, time_limit=60), reference.brute_force(problem)
    assert all(reference.isclose(stage.value, least) for stage, least in zip(plan.stages, best, strict=True))
    assert plan.gap <= 1e-6


def test_an_owner_whose_first_job_is_dropped_is_measured_by_the_others():
    """Kept alone, b has waited for 4 of its 1 slots; beside a, dear, the owner's 5 slots are 5 at least."""
    jobs = (
        Job(name="a", work=1.0, throughput=POINT, value=2.0, deadline=1),
        Job(name="b", work=1.0, throughput=POINT, release=1, value=100.0),
    )
    pool = Pool(name="p", count=1, price={"slots": [9, 50, 50, 50, 1, 1]})
    for weight in (0.5, 3.0, 30.0):
        objective = Objective(weights={"cost": 1.0, "owner_fairness": weight})
        problem = Problem(slots=6, pools=(pool,), jobs=jobs, objective=objective)
        plan = schedule.solve(problem, gap=0.0, time_limit=60)
        (best,) = reference.brute_force(problem)
        assert plan.bound <= best * (1 + 1e-6) and reference.isclose(plan.value, best)
    measure = Bottleneck(problem, "owner_fairness", frozenset({0, 1}))
    assert 4.0 in measure.values and 0.0 in measure.values and measure.values[measure.reached({1: ((4, 0, 1),)})] == 4.0


@pytest.mark.parametrize("family, value, possible", [("B", 1.5385, False), ("B", 1.5625, True), ("C", 1.2381, False)])
def test_a_quick_look_decides_what_the_relaxation_does_not(family, value, possible):
    problem = schedule.generate(12, 3, 36, 0.6, family, seed=1).problem
    stage = instance.stage_for(problem, {"cost": 1.0})
    stage = replace(stage, ends=Bottleneck(problem, "fairness").ends(value, stage.ends))
    probe = feasibility.Probe(problem, stage, worker.shared(), 0)
    assert not probe._search(time.monotonic() + 60).sketch().infeasible
    probe.quick(time.monotonic() + 60)
    assert probe.infeasible != possible


def test_the_least_slowdown_is_proven():
    problem = schedule.generate(12, 3, 36, 0.6, "B", seed=1).problem
    plan = schedule.solve(replace(problem, objective=Objective(order=("fairness",))), time_limit=60)
    assert plan.stages[0].value == plan.stages[0].bound == 1.5625


def test_what_later_stages_leave_of_the_time_goes_to_the_first(monkeypatch):
    run = bisection.Bisection.run
    calls = []

    def impatient(self, end, quick=False):
        calls.append(self)
        if len(calls) > 1:
            return run(self, end, quick)
        self._look(len(self.values) - 1, end)
        return self

    monkeypatch.setattr(bisection.Bisection, "run", impatient)
    problem = schedule.generate(6, 2, 24, 0.6, "B", seed=1).problem
    plan = schedule.solve(replace(problem, objective=Objective(order=("fairness", "cost"))), time_limit=60)
    assert len(calls) == 2 and calls[0] is calls[1] and plan.stages[0].gap <= 0.01
    assert [stage.measure for stage in plan.stages] == ["fairness", "cost"] and plan.stages[1].gap <= 0.01


@pytest.mark.parametrize(
    "cut, seconds, words",
    [
        (False, 3.0, "the search ended after 3.0 s, with nothing left to try"),
        (True, 3.0, "it took 3.0 s and cut some steps short"),
        (True, 7.8, "time ran out after 7.8 s"),
    ],
)
def test_the_status_says_why_the_search_ended(cut, seconds, words):
    status = solver._status((StageResult("fairness", 2.0, 1.0),), "", cut, 0.01, seconds, 8.0)
    assert status.startswith("within 50.00% of the best possible, short of the 1.00% asked; ") and words in status


@pytest.mark.parametrize("order", [("makespan", "cost"), ("fairness",)])
def test_the_error_says_that_a_value_does_not_count(order):
    jobs = (Job(name="a", work=3.0, throughput=POINT), Job(name="b", work=3.0, throughput=POINT, value=1.0))
    problem = Problem(slots=4, pools=(Pool(name="p", count=1),), jobs=jobs, objective=Objective(order=order))
    with pytest.raises(schedule.Infeasible, match="b may not be dropped despite a value, which counts only where cost"):
        schedule.solve(problem, time_limit=60, explain=False)
    assert schedule.solve(replace(problem, objective=Objective()), time_limit=60).dropped == ["b"]
