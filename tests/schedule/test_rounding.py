"""Large problems in which nothing ties one slot to the next: the relaxation in full, and the plan near it."""

import numpy as np
import pytest

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate, bounds, instance, search, worker
from bigmodel.schedule.construct import construct, rounded


def relaxed(problem):
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    relaxation = bounds.Relaxation(inst)
    found = worker.shared().call("linprog", relaxation.program() | {"method": "highs-ipm"}, 60)
    return inst, relaxation.prices(found["marginals"]), relaxation.devices(found["x"]), found["value"]


def test_the_relaxation_is_nearly_a_plan():
    """Gangs that may change in every slot: rounded, it is much nearer to its value than a plan made from its prices."""
    inst, prices, held, value = relaxed(schedule.generate(40, 3, 72, 0.85, "B", seed=2).problem.expanded)
    assert (held.sum(axis=0) <= inst.count + 1e-6).all()
    near, priced = rounded(inst, prices, held), construct(inst, prices)
    assert near.score()[:2] == (0, 0.0) and (near.left >= 0).all()
    assert near.score()[2] - value < 0.7 * (priced.score()[2] - value)


def _job(name, work, **more):
    points = tuple(Rate(pool=p, devices=n, rate=n / 3600) for p in ("a", "b") for n in (1, 2))
    return Job(name=name, work=work, throughput=points, **more)


def test_rounding_keeps_order_drops_and_quotas():
    """What it is given overbooks everything: each job both devices of both pools in every slot."""
    pools = tuple(Pool(name=p, count=2, price=1.0, quota_group="q") for p in "ab")
    jobs = (
        _job("first", 4.0, deadline=4, value=100.0),
        _job("second", 4.0, after=("first",), value=100.0),
        _job("third", 3.0),
    )
    problem = Problem(slots=8, pools=pools, jobs=jobs, quotas={"q": 2}).expanded
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    state = rounded(inst, bounds.Prices.zero(inst), np.full((3, 2, 8), 2.0))
    assert {0, 1, 2} == set(state.schedules)
    assert (state.left >= 0).all() and (np.array(state.quota) >= 0).all()
    assert state.finish(0) <= state.start(1)


@pytest.fixture
def large(monkeypatch):
    """Every problem counts as large."""
    for limit in ("_TINY_MODEL", "_WHOLE_MODEL", "_ROUGH_MODEL", "_FEASIBILITY_MODEL"):
        monkeypatch.setattr(search, limit, 0)
    generated = []
    generate = search.Search._generate
    monkeypatch.setattr(search.Search, "_generate", lambda self, *rest: (generated.append(1), generate(self, *rest)))
    return generated


@pytest.mark.parametrize("family", ["A", "B"])
def test_a_loose_problem_is_rounded(large, family):
    problem = schedule.generate(30, 3, 48, 0.8, family, seed=3).problem
    plan = schedule.solve(problem, time_limit=20, gap=0.03)
    *_, value = relaxed(problem.expanded)
    assert not large and plan.account.violations == []
    assert plan.complete and plan.bound >= value * (1 - 1e-5) and plan.gap <= 0.03


def test_a_problem_with_switching_costs_is_not(large):
    schedule.solve(schedule.generate(10, 2, 24, 0.5, "C", seed=1).problem, time_limit=20, gap=0.0)
    assert large


@pytest.mark.parametrize("error", [worker.Overdue(), worker.Lost("gone")], ids=["overdue", "lost"])
def test_without_the_relaxation_in_full_columns_are_generated(large, monkeypatch, error):
    finish, calls = worker.Worker.finish, 0

    def second_fails(self, limit):
        nonlocal calls
        calls += 1
        answer = finish(self, limit)
        if calls == 2:
            raise error
        return answer

    monkeypatch.setattr(worker.Worker, "finish", second_fails)
    plan = schedule.solve(schedule.generate(20, 2, 36, 0.8, "B", seed=2).problem, time_limit=10, gap=0.001)
    assert large and plan.account.violations == [] and not plan.complete


def test_what_the_relaxation_in_full_disproves_is_infeasible(large):
    """Two jobs that need the fast pool in most slots; in the rough relaxation they run on several pools at once."""
    pools = tuple(Pool(name=p, count=4, price=1.0) for p in "fst")
    points = tuple(Rate(pool=p, devices=4, rate=rate / 3600) for p, rate in zip("fst", (4.0, 2.0, 2.0), strict=True))
    jobs = tuple(Job(name=f"j{i}", work=35.0, throughput=points) for i in range(2))
    problem = Problem(slots=10, pools=pools, jobs=jobs).expanded
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    rough = bounds.Relaxation(inst, rough=True)
    assert worker.shared().call("linprog", rough.program() | {"method": "highs-ipm"}, 20)["status"] == 0
    with pytest.raises(schedule.Infeasible):
        schedule.solve(problem, time_limit=10, explain=False)


def test_no_plan_and_no_room_for_the_whole_programme_is_unknown(large, monkeypatch):
    """Nothing to recombine yet: no error of the solver's."""
    monkeypatch.setattr(search.Search, "_offer", lambda self, state: None)
    with pytest.raises(schedule.Unknown):
        schedule.solve(schedule.generate(8, 2, 24, 0.5, "B", seed=1).problem, time_limit=3)
