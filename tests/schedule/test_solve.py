"""Plans against brute force, planted plans and each other; determinism and bad input."""

import re
import time
from dataclasses import replace
from pathlib import Path

import campaign_random
import numpy as np
import pytest
import second_checker as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from bigmodel import schedule
from bigmodel.schedule import (
    Job,
    Objective,
    Pool,
    Problem,
    Rate,
    bounds,
    instance,
    mip,
    programmes,
    search,
    solver,
    state,
    worker,
)
from bigmodel.schedule import path as paths
from bigmodel.schedule.bounds import Prices, lagrangian
from bigmodel.schedule.columns import Columns
from bigmodel.schedule.construct import construct
from bigmodel.schedule.fill import hull

FEW = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@given(st.integers(10**6, 10**9))
@FEW
def test_tiny_problems_equal_brute_force(seed):
    problem, _ = reference.random_problem(seed, tiny=True)
    plan = schedule.solve(problem, gap=0.0, time_limit=20)
    assert plan.gap <= 1e-6
    assert reference.isclose(plan.value, reference.brute_force(problem)[0])


@given(st.integers(0, 10**6))
@FEW
def test_every_objective_equals_brute_force(seed):
    problem = reference.with_objective(reference.random_problem(seed, tiny=True)[0], seed)
    best = reference.brute_force(problem)
    try:
        plan = schedule.solve(problem, gap=0.0, time_limit=20, explain=False)
    except schedule.Infeasible:
        assert best is None
        return
    assert reference.broken(problem, plan.allocation)[0] == []
    assert all(reference.isclose(stage.value, least) for stage, least in zip(plan.stages, best, strict=True))
    assert all(stage.bound <= least * (1 + 1e-6) + 1e-6 for stage, least in zip(plan.stages, best, strict=True))


def test_a_plan_may_drop_every_job():
    """Too dear to search no further: the master has no schedule to recombine."""
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=f"j{i}", work=2.0, throughput=points, value=1.0, restart=0.5, deadline=2) for i in range(2))
    problem = Problem(slots=4, pools=(Pool(name="p", count=0, price=9.0),), jobs=jobs)
    plan = schedule.solve(problem, gap=0.0)
    assert plan.dropped == ["j0", "j1"] and plan.value == pytest.approx(2.0) and plan.cost == 0.0


@pytest.mark.parametrize("first", range(21_080, 21_380, 25))
def test_random_problems_with_a_planted_plan(first):
    # Seeds that no recorded campaign has used; the first 20 are tiny.
    verdicts = [campaign_random.trial(seed, seconds=0.4) for seed in range(first, first + 25)]
    assert [verdict for verdict in verdicts if not verdict.startswith("good")] == []


@given(st.integers(0, 10**6))
@FEW
def test_doubled_prices_double_cost_and_bound(seed):
    problem, _ = reference.random_problem(seed, tiny=True)
    pools = tuple(replace(pool, price={"slots": [2 * x for x in pool.price["slots"]]}) for pool in problem.pools)
    jobs = tuple(
        replace(job, budget=job.budget and 2 * job.budget, value=job.value and 2 * job.value) for job in problem.jobs
    )
    double = replace(problem, pools=pools, jobs=jobs, budget=problem.budget and 2 * problem.budget)
    once, twice = schedule.solve(problem, gap=0.0), schedule.solve(double, gap=0.0)
    assert reference.isclose(2 * once.value, twice.value)
    assert reference.isclose(2 * once.bound, twice.bound, 1e-4)


@given(st.integers(0, 10**6))
@FEW
def test_what_is_relaxed_is_no_dearer(seed):
    problem, _ = reference.random_problem(seed, tiny=True)
    cost = schedule.solve(problem, gap=0.0).value
    wider = tuple(replace(job, deadline=None) for job in problem.jobs)
    assert schedule.solve(replace(problem, jobs=wider), gap=0.0).bound <= cost * (1 + 1e-6) + 1e-9
    more = (*problem.pools, Pool(name="more", count=2, price=1.0))
    jobs = tuple(replace(j, throughput=(*j.throughput, Rate(pool="more", devices=1, rate=5.0))) for j in problem.jobs)
    jobs = tuple(replace(j, mix_pools=False) for j in jobs)
    assert schedule.solve(replace(problem, pools=more, jobs=jobs), gap=0.0).bound <= cost * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_generated_problems_are_feasible_and_planned(family):
    planted = schedule.generate(10, 2, 24, 0.6, family, seed=3)
    assert schedule.check(planted.problem, planted.allocation).violations == []
    assert reference.broken(planted.problem, planted.allocation)[0] == []
    plan = schedule.solve(planted.problem, time_limit=2, gap=0.05)
    assert reference.broken(planted.problem, plan.allocation)[0] == []
    assert plan.bound <= plan.value <= schedule.check(planted.problem, planted.allocation).measure("cost") * 1.0001


@pytest.mark.parametrize("seed", range(8))
def test_the_lagrangian_bound_is_below_any_plan_at_any_prices(seed):
    problem, planted = reference.random_problem(30_000 + seed)
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    cost = reference.broken(problem, planted)[1]
    rng = np.random.default_rng(seed)
    for _ in range(4):
        prices = Prices.zero(inst)
        prices.capacity += rng.exponential(1.0, prices.capacity.shape)
        prices.limit += rng.exponential(0.5, prices.limit.shape)
        prices.order += rng.exponential(0.3, prices.order.shape)
        bound = lagrangian(inst, prices)
        assert bound <= cost * (1 + 1e-9)
        assert lagrangian(inst, prices, late=lambda: True) <= bound + 1e-6 * abs(bound)
        assert lagrangian(inst, prices, units=20) <= bound + 1e-6 * abs(bound)
        assert lagrangian(inst, prices, units=paths.FINE) <= cost * (1 + 1e-9)


def ordered_pair():
    """b before a, of one slot each; both want slot 1, which costs 1 where the others cost 5."""
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = (Job(name="b", work=1.0, throughput=points), Job(name="a", work=1.0, throughput=points, after=("b",)))
    problem = Problem(slots=3, pools=(Pool(name="p", count=2, price={"slots": [5, 1, 5]}),), jobs=jobs)
    return instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))


def test_order_has_a_price():
    inst = ordered_pair()
    prices = Prices.zero(inst)
    assert inst.pairs == [(0, 1)] and lagrangian(inst, prices) == pytest.approx(2.0)
    prices.order[0, 1] = 4.0
    assert lagrangian(inst, prices) == pytest.approx(6.0)  # 5 + 1: the optimum


def test_the_master_knows_order_and_its_prices_certify_the_optimum():
    inst = ordered_pair()
    columns = Columns(inst)
    for j, slot in ((0, 0), (0, 1), (1, 1), (1, 2)):
        columns.add(j, ((slot, 0, 1),))
    found = worker.shared().call("linprog", columns.master(np.full(2, 100.0)) | {"method": "highs"}, 20)
    assert found["value"] == pytest.approx(6.0)
    assert lagrangian(inst, columns.prices(found["marginals"])) == pytest.approx(6.0)
    chosen = columns.rounded(np.array([0.5, 0.5, 0.6, 0.4, 0, 0]))
    assert {j: schedule.use for j, schedule in chosen.schedules.items()} == {1: ((1, 0, 1),), 0: ((0, 0, 1),)}


def test_a_boxed_master_keeps_prices_near_its_centre():
    problem = schedule.generate(12, 1, 24, 0.85, "B", seed=2).problem
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    columns, zero, penalty = Columns(inst), Prices.zero(inst), np.full(12, 1e4)
    for data in inst.jobs:
        columns.add(data.index, state.cheapest(inst, data, inst.unit, inst.free()).use)
    solve = lambda program: worker.shared().call("linprog", program | {"method": "highs"}, 20)  # noqa: E731
    free, wide = solve(columns.master(penalty)), solve(columns.boxed(penalty, zero, 1e6))
    assert wide["value"] == pytest.approx(free["value"])
    narrow = solve(columns.boxed(penalty, zero, 0.2))
    prices = columns.prices(narrow["marginals"]).capacity
    assert narrow["value"] < free["value"] and 0 < prices.max() <= 0.2 * inst.unit[inst.count > 0].mean() * (1 + 1e-9)


def test_the_lagrangian_bound_is_tight_where_capacity_has_a_price():
    """Two jobs of two hours by slot 2, one cheap device: one pays 3 an hour more, the rent of the cheap."""
    points = tuple(Rate(pool=p, devices=1, rate=1 / 3600) for p in ("cheap", "dear"))
    jobs = tuple(Job(name=f"j{i}", work=2.0, throughput=points) for i in range(2))
    pools = (Pool(name="cheap", count=1, price=1.0), Pool(name="dear", count=2, price=4.0))
    problem = Problem(slots=2, pools=pools, jobs=jobs)
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    relaxation = bounds.Relaxation(inst)
    found = linprog(**relaxation.program())
    prices = relaxation.prices(found.ineqlin.marginals)
    assert prices.rent(inst) == pytest.approx(-6.0)
    assert lagrangian(inst, prices) == pytest.approx(10.0) == found.fun


@pytest.mark.parametrize("seed", range(6))
def test_the_dynamic_programme_is_exact_alone(seed):
    """One job alone: bound, schedule and the programme of milp agree."""
    rng = np.random.default_rng(seed)
    points = tuple(Rate(pool=p, devices=n, rate=float(rng.uniform(0.6, 1) * n)) for p in "ab" for n in (1, 2))
    job = Job(
        name="j", work=float(rng.uniform(3, 9) * 3600), throughput=points, min_run=int(rng.integers(1, 4)),
        restart=float(rng.choice([0.0, 0.4])),
    )  # fmt: skip
    pools = tuple(
        Pool(name=p, count=2, price={"slots": rng.uniform(1, 5, 12).round(2).tolist()}, billing="second",
             startup_hours=float(rng.choice([0.0, 0.3, 1.2])))
        for p in "ab"
    )  # fmt: skip
    problem = Problem(slots=12, pools=pools, jobs=(job,))
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    low, high = (
        paths.cheapest(inst.jobs[0], inst.unit, inst.free(), 1.0, rounding=rounding, first=0, last=12).cost
        for rounding in ("up", "down")
    )
    run = search.Search(inst, solver.shared(), time.monotonic() + 20, 0.0)
    exact = mip.solve(run.worker, programmes.model(inst, [0], state.State(inst)).program(), 20)
    assert not exact.late
    assert low <= exact.value * (1 + 1e-6) and exact.value <= high * (1 + 1e-6)
    assert high - low <= 0.03 * high


def test_objectives_in_order_and_weighted():
    points = (Rate(pool="dear", devices=1, rate=1 / 3600), Rate(pool="cheap", devices=1, rate=1 / 3600))
    jobs = tuple(Job(name=f"j{i}", work=2.0, throughput=points) for i in range(2))
    pools = (
        Pool(name="dear", count=2, price=5.0, kw=1.0, carbon=100.0),
        Pool(name="cheap", count=1, price=1.0, kw=1.0, carbon=900.0),
    )
    base = Problem(slots=6, pools=pools, jobs=jobs)

    def plan(**objective):
        return schedule.solve(replace(base, objective=Objective(**objective)), gap=0.0)

    assert plan().value == pytest.approx(4.0)
    soon = plan(order=("makespan", "cost"))
    assert [stage.measure for stage in soon.stages] == ["makespan", "cost"]
    assert soon.stages[0].value == soon.stages[0].bound == 2.0 and soon.cost == pytest.approx(12.0)
    assert plan(order=("cost", "makespan")).stages[1].value == 4.0
    assert plan(order=("carbon",)).value == pytest.approx(0.4)
    assert plan(order=("fairness", "cost")).stages[0].value == pytest.approx(1.0)
    assert plan(weights={"cost": 1.0, "carbon": 20.0}).cost == pytest.approx(20.0)
    assert plan(weights={"cost": 1.0, "makespan": 3.0}).value == pytest.approx(4 + 12)
    assert plan(weights={"cost": 1.0, "makespan": 5.0}).value == pytest.approx(12 + 10)


def test_lateness_is_minimised_by_priority():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(
        Job(name=name, work=2.0, throughput=points, deadline=2, soft=True, priority=priority)
        for name, priority in (("low", 1.0), ("high", 5.0))
    )
    problem = Problem(
        slots=6, pools=(Pool(name="p", count=1),), jobs=jobs, objective=Objective(order=("lateness", "cost"))
    )
    plan = schedule.solve(problem, gap=0.0)
    assert plan.value == pytest.approx(2.0) and plan.finish == {"low": 4, "high": 2}


def test_a_job_is_dropped_where_its_value_is_below_its_cost():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=f"v{value}", work=2.0, throughput=points, value=float(value)) for value in (1, 3))
    plan = schedule.solve(Problem(slots=4, pools=(Pool(name="p", count=2, price=1.0),), jobs=jobs), gap=0.0)
    assert plan.dropped == ["v1"] and plan.value == pytest.approx(1 + 2) and plan.cost == pytest.approx(2)


def test_a_job_without_a_window_left_is_dropped_and_disturbs_nobody():
    """What it follows cannot end before its deadline."""
    problem = schedule.generate(6, 1, 24, 0.6, "C", seed=2).problem
    point = Rate(pool=problem.pools[0].name, devices=1, rate=1 / 3600)
    long = Job(name="long", work=5.0, throughput=(point,))
    gone = Job(name="gone", work=1.0, throughput=(point,), value=9.0, deadline=5, after=("long",))
    plan = schedule.solve(replace(problem, jobs=(*problem.jobs, long, gone)), gap=0.0, time_limit=3)
    assert plan.dropped == ["gone"]


@pytest.mark.parametrize("order", [("cost",), ("lateness", "cost"), ("carbon", "cost")])
def test_slots_of_one_price_scatter_no_job(order):
    points = (Rate(pool="gpu", devices=8, rate=70.0),)
    jobs = tuple(Job(name=name, work=70.0 * 3600 * hours, throughput=points) for name, hours in (("a", 10), ("b", 5)))
    problem = Problem(
        slots=40, pools=(Pool(name="gpu", count=8, price=1.0),), jobs=jobs, objective=Objective(order=order)
    )
    runs = schedule.solve(problem, gap=0.0).runs
    assert len(runs["a"]) == len(runs["b"]) == 1
    assert sorted((run.first, run.last) for (run,) in runs.values())[0][0] == 0
    assert max(run.last for (run,) in runs.values()) == 15


def test_same_input_and_seed_give_the_same_plan():
    problem = schedule.generate(8, 2, 24, 0.5, "B", seed=1).problem
    plans = [schedule.solve(problem, time_limit=30, gap=0.05, seed=4) for _ in range(2)]
    assert all(plan.complete for plan in plans)
    assert (plans[0].allocation == plans[1].allocation).all()


def test_a_plan_that_breaks_a_rule_is_not_returned(monkeypatch):
    problem = schedule.generate(3, 1, 12, 0.3, "B", seed=1).problem
    honest = search.Search.run

    def cheat(self, start=None):
        honest(self, start)
        self.best = {j: use[:-1] for j, use in self.best.items()}
        return self

    monkeypatch.setattr(search.Search, "run", cheat)
    with pytest.raises(RuntimeError, match="breaks a rule and is not returned"):
        schedule.solve(problem, gap=0.5)


@pytest.mark.parametrize(
    "arguments", [{"time_limit": 0}, {"time_limit": "3"}, {"gap": -1}, {"seed": "x"}, {"backend": "cp-sat"}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="^solve: "):
        schedule.solve(schedule.generate(2, 1, 12, 0.3, "B").problem, **arguments)


def test_no_private_module_of_scipy():
    for path in Path(schedule.__file__).parent.rglob("*.py"):
        assert not re.search(r"scipy[\w.]*\._", path.read_text()), path.name


def test_a_hull_of_many_counts_is_that_of_its_corners():
    devices = np.arange(1, 5001)
    rate = np.interp(devices, [0, 1, 1025, 3000, 5000], [0, 1.0, 513.0, 513.0, 1013.0])
    assert hull(devices, rate) == [(0, 0.0), (1, 1.0), (1025, 513.0), (5000, 1013.0)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        rate = np.cumsum(rng.uniform(-0.2, 1, 300))
        found = hull(devices[:300], rate)
        slopes = np.diff([r for _, r in found]) / np.diff([n for n, _ in found])
        assert (np.diff(slopes) < 0).all() and (slopes > 0).all()
        every, top = devices[:300], found[-1][0]
        majorant = np.interp(every, *zip(*found, strict=True))
        assert (majorant[every <= top] >= rate[every <= top] - 1e-9).all() and rate.max() <= found[-1][1] + 1e-12


@pytest.mark.parametrize("quota", [8, 9, 10])
def test_a_job_that_mixes_pools_keeps_their_quota(quota):
    """Each pool alone has room within the quota; together they have not. Found by seed 7570 of the campaign."""
    points = tuple(Rate(pool=p, devices=n, rate=n / 3600) for p in "ab" for n in (1, 6))
    pools = tuple(Pool(name=p, count=6, price=price, quota_group="q") for p, price in (("a", 1.0), ("b", 1.5)))
    jobs = (
        Job(name="mixed", work=5.5 * quota, throughput=points, mix_pools=True),
        Job(name="gang", work=6.0, throughput=points, counts=(1, 2)),
    )
    problem = Problem(slots=7, pools=pools, jobs=jobs, quotas={"q": quota})
    inst = instance.build(problem.expanded, instance.stage_for(problem.expanded, {"cost": 1.0}))
    first = construct(inst, Prices.zero(inst))
    assert first.score()[0] == 0 and (np.array(first.quota) >= 0).all()
    assert schedule.solve(problem, time_limit=10).account.violations == []


def test_a_neighbourhood_drops_nothing_that_others_follow():
    """Freed alone, the first job is dearer than its value; what follows it stays where it is."""
    points = (Rate(pool="a", devices=1, rate=1 / 3600),)
    jobs = (
        Job(name="first", work=2.0, throughput=points, value=1.0),
        Job(name="second", work=2.0, throughput=points, after=("first",)),
    )
    problem = Problem(slots=8, pools=(Pool(name="a", count=1, price=1.0),), jobs=jobs).expanded
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    plan = state.State.holding(inst, {0: ((0, 0, 1), (1, 0, 1)), 1: ((4, 0, 1), (5, 0, 1))})
    read = []
    for seed in range(8):
        programme = programmes.few_jobs(inst, plan, np.random.default_rng(seed), 1)
        answer = mip.solve(worker.shared(), programme.arrays, 5.0)
        read.append(programme.read(answer.x))
    assert None in read  # the first was freed
    assert all(0 in found.schedules for found in read if found is not None and 1 in found.schedules)
