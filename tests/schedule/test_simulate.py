"""Policies over traces of prices and interruptions."""

from dataclasses import replace

import campaign_traces
import numpy as np
import pytest
from small import plan, problem

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate, Running, Trace, simulation


def test_policies_on_a_trace():
    week = campaign_traces.problem(3, slots=36, jobs=4)
    trace = simulation.trace(week, 3)
    bound = simulation.clairvoyant(week, trace, 2.0)
    outcomes = {policy: schedule.simulate(week, trace, policy) for policy in simulation.POLICIES}
    assert all(outcome.cost >= bound * (1 - 1e-6) for outcome in outcomes.values() if not outcome.missed)
    assert outcomes["plan"].cost < outcomes["greedy"].cost < outcomes["on_demand"].cost
    assert len(outcomes["plan"].missed) <= len(outcomes["greedy"].missed)


def test_a_calm_trace_costs_what_the_plan_says():
    week = Problem(slots=12, pools=problem().pools, jobs=problem().jobs)
    trace = simulation.Trace(week.price, week.count, week.price)
    outcome = schedule.simulate(week, trace, "plan")
    assert outcome.cost == pytest.approx(plan().cost) and outcome.interruptions == 0


def test_an_interruption_costs_work_and_a_restart():
    base = problem(checkpoint_every=1.0)
    pools = (replace(base.pools[0], ownership="spot"), base.pools[1])
    base = replace(base, pools=pools)
    count = base.count.copy()
    count[0, 2] = 0
    outcome = simulation.simulate(base, simulation.Trace(base.price, count, base.price), "greedy")
    # Two hours done, half of one lost: 4.5 left and half an hour of restart on the other pool.
    assert outcome.interruptions == 1 and outcome.cost >= 2 * 1.0 + 5 * 1.0


def test_every_policy_keeps_quotas_runs_and_its_own_pools():
    """Two gangs under a quota for one; a job that is not preemptible while another pool turns cheaper."""
    points = tuple(Rate(pool=pool, devices=2, rate=1 / 3600) for pool in ("rent", "own"))
    jobs = tuple(
        Job(name=name, work=3.0, throughput=points, preemptible=name == "free", deadline=12)
        for name in ("free", "whole")
    )
    pools = (
        Pool(name="rent", count=4, price={"slots": [2.0, 9.0] * 6}, quota_group="q"),
        Pool(name="own", count=4, price={"slots": [3.0] * 12}, ownership="owned", quota_group="q"),
    )
    week = Problem(slots=12, pools=pools, jobs=jobs, quotas={"q": 2})
    calm = simulation.Trace(week.price, week.count, week.price)
    # One at a time: six slots; "whole" stays where it began, "free" takes the cheaper of 2, 3, 2.
    assert schedule.simulate(week, calm, "on_demand").cost == pytest.approx(2 * (2 + 9 + 2 + 9 + 2 + 9))
    assert schedule.simulate(week, calm, "greedy").cost == pytest.approx(2 * (2 + 3 + 2 + 3 * 3))
    bound = schedule.simulate(week, calm, "clairvoyant")
    assert bound.policy == "clairvoyant" and 0 < bound.cost <= schedule.simulate(week, calm, "plan").cost


def test_a_job_released_shortly_before_its_deadline_is_planned():
    week = replace(problem(), jobs=(replace(problem().jobs[0], work=1.0, release=5, deadline=6),))
    assert schedule.simulate(week, simulation.Trace(week.price, week.count, week.price)).missed == ()


@pytest.mark.parametrize(
    "job, trace, words",
    [
        ({"mix_pools": True, "restart": 0.0}, {}, "simulate: job long mixes pools"),
        ({"throughput": (Rate(pool="cheap", devices=1, rate=1.0),)}, {}, "simulate: job long has no owned, reserved"),
        ({}, {"price": np.zeros((1, 2))}, "simulate: trace.price has shape (1, 2)"),
    ],
)
def test_what_cannot_be_replayed_is_refused(job, trace, words):
    week = problem()
    pools = (replace(week.pools[0], ownership="spot"), week.pools[1])
    week = replace(week, pools=pools, jobs=(replace(week.jobs[0], **job),))
    with pytest.raises(ValueError) as error:
        schedule.simulate(week, replace(simulation.trace(week, 0), **trace), "greedy")
    assert str(error.value).startswith(words)


def test_traces_are_in_hours_whatever_the_slots():
    week = campaign_traces.problem(0)
    hourly, fine = simulation.trace(week, 5), simulation.trace(replace(week, slots=144, slot_hours=0.5), 5)
    assert (fine.count[1, ::2] == hourly.count[1]).all() and (fine.count[1, 1::2] == hourly.count[1]).all()
    assert fine.price[1, ::2] == pytest.approx(hourly.price[1])


def test_unknown_policy():
    week = problem()
    with pytest.raises(ValueError, match="simulate: policy: is 'luck'; accepted are 'clairvoyant', 'fcfs'"):
        schedule.simulate(week, simulation.Trace(week.price, week.count, week.price), "luck")


def test_traces_are_seeded_and_within_what_is_said():
    week = campaign_traces.problem(0)
    one, two = simulation.trace(week, 5), simulation.trace(week, 5)
    assert (one.price == two.price).all() and (one.count == two.count).all()
    spot = one.count[1] > 0
    edges = np.flatnonzero(np.diff(spot.astype(int)))
    lengths = np.diff(edges)
    assert lengths.max() <= 24 and (one.count[[0, 2]] == week.count[[0, 2]]).all()


def calm(week):
    return Trace(week.price, week.count, week.price)


def one(**more):
    """An hour's work on a device at 1, then 7 an hour."""
    job = Job(**{"name": "a", "work": 1.0, "throughput": (Rate(pool="g", devices=1, rate=1 / 3600),)} | more)
    return Problem(slots=8, pools=(Pool(name="g", count=2, price={"slots": [1.0] * 4 + [7.0] * 4}),), jobs=(job,))


@pytest.mark.parametrize("policy", [*simulation.POLICIES, simulation.BOUND])
def test_a_replay_begins_where_the_problem_stands(policy):
    """Half an hour of restart and the last of four hours, from slot 4 on: two slots at 7."""
    week = replace(one(work=4.0, done=3.0, started=True, restart=0.5), now=4)
    assert schedule.simulate(week, calm(week), policy).cost == pytest.approx(14.0, rel=1e-6)
    running = Running(pool="g", devices=1, slots=2, setup_left=0.25)
    week = replace(week, jobs=(replace(week.jobs[0], running=running, done=3.25),), stability=100.0)
    assert schedule.simulate(week, calm(week), policy).cost == pytest.approx(7.0, rel=1e-6)


def test_what_runs_at_the_beginning_may_be_interrupted_there():
    """Slot 4 has no device: half an hour of four is lost, and half an hour of restart."""
    running = Running(pool="g", devices=1, slots=4)
    week = one(work=4.0, done=3.0, started=True, restart=0.5, checkpoint_every=1.0, running=running, preemptible=False)
    week = replace(week, now=4)
    count = week.count.copy()
    count[0, 4] = 0
    trace = replace(calm(week), count=count)
    greedy, bound = (schedule.simulate(week, trace, policy) for policy in ("greedy", "clairvoyant"))
    assert greedy.cost == pytest.approx(14.0) and greedy.interruptions == 1
    assert bound.cost == pytest.approx(14.0, rel=1e-6)


def test_budgets_hold_nobody_back_nor_lift_the_bound():
    """The first slot is cheap and has room for one alone; a budget would leave it to `a`, of one device."""
    week = one(budget=1.0)
    big = Job(name="b", work=1.0, throughput=(Rate(pool="g", devices=2, rate=1 / 3600),))
    pools = (replace(week.pools[0], price={"slots": [1.0, 5.0]}),)
    week = Problem(slots=2, pools=pools, jobs=(big, week.jobs[0]), budgets={"": 11.5}, budget=11.5)
    costs = [schedule.simulate(week, calm(week), policy).cost for policy in ("greedy", "plan", "clairvoyant")]
    assert costs == pytest.approx([7.0] * 3, rel=1e-6)


def test_what_is_left_out_costs_its_value_in_every_policy_and_in_the_bound():
    week = one(value=0.5)
    dropped, bound = (schedule.simulate(week, calm(week), policy) for policy in ("plan", "clairvoyant"))
    assert (dropped.cost, dropped.missed) == (pytest.approx(0.5), ("a",)) and bound.cost == pytest.approx(0.5)
    assert schedule.simulate(week, calm(week), "greedy").cost == pytest.approx(1.0)


@pytest.mark.parametrize("policy", simulation.POLICIES)
def test_no_policy_holds_more_than_the_trace_has(policy):
    """Of two devices one is there: two jobs of an hour cost 1 and 5."""
    week = one(deadline=8)
    pools = (replace(week.pools[0], price={"slots": [1.0] + [5.0] * 7}),)
    week = replace(week, pools=pools, jobs=(week.jobs[0], replace(week.jobs[0], name="b", deadline=2)))
    trace = replace(calm(week), count=week.count - 1)
    assert schedule.simulate(week, trace, policy).cost >= schedule.simulate(week, trace, "clairvoyant").cost - 1e-6


def test_stability_is_in_no_cost_nor_in_the_bound():
    """To go on costs 6 x 3; to move, half an hour of restart and six hours at 1, and no stability."""
    week = problem(started=True, running=Running(pool="dear", devices=1, slots=1))
    week = replace(week, stability=100.0)
    greedy, bound = (schedule.simulate(week, calm(week), policy) for policy in ("greedy", "clairvoyant"))
    assert greedy.cost == pytest.approx(7.0) and bound.cost == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize("job", [{"min_run": 4}, {"preemptible": False}])
def test_the_bound_allows_the_broken_runs_that_a_trace_makes(job):
    """A spot pool that is up every other hour, at a hundredth of the price: two broken runs cost 0.04."""
    points = tuple(Rate(pool=pool, devices=1, rate=1 / 3600) for pool in ("spot", "dear"))
    pools = (Pool(name="spot", count=1, price=0.01, ownership="spot"), Pool(name="dear", count=1, price=1.0))
    week = Problem(slots=20, pools=pools, jobs=(Job(name="a", work=4.0, throughput=points, **job),))
    count = week.count.copy()
    count[0, 1::2] = 0
    trace = replace(calm(week), count=count)
    greedy, bound = (schedule.simulate(week, trace, policy) for policy in ("greedy", "clairvoyant"))
    assert greedy.missed == () and bound.cost <= greedy.cost + 1e-6


def test_a_soft_deadline_is_a_deadline_to_every_policy():
    week = one(deadline=3, soft=True)
    week = replace(week, pools=(replace(week.pools[0], price={"slots": [7.0] * 4 + [1.0] * 4}),))
    for policy in simulation.POLICIES:
        assert schedule.simulate(week, calm(week), policy).missed == (), policy


@pytest.mark.parametrize(
    "trace, words",
    [
        (None, "simulate: trace: must be a Trace, got None."),
        ({"price": np.full((1, 8), np.nan)}, "simulate: trace.price must hold finite numbers, none below 0."),
        ({"count": -np.ones((1, 8))}, "simulate: trace.count must hold finite whole numbers, none below 0."),
        ({"count": np.full((1, 8), 0.5)}, "simulate: trace.count must hold finite whole numbers, none below 0."),
        ({"mean": [[1.0] * 8]}, "simulate: trace.mean must be an array of numbers."),
    ],
)
def test_what_is_no_trace_is_refused(trace, words):
    week = one()
    with pytest.raises(ValueError) as error:
        schedule.simulate(week, trace and replace(calm(week), **trace), "greedy")
    assert str(error.value) == words


def test_seeds_and_sizes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="^trace: seed: is -1"):
        schedule.trace(one(), -1)
    for name, value in (("jobs", 0), ("slots", 0), ("pools", 7), ("load", 2.0), ("family", "D"), ("seed", -1)):
        with pytest.raises(ValueError, match=f"^generate: {name}: is {value!r}"):
            schedule.generate(**{name: value})
