"""Planning again from where the jobs are, and replaying traces."""

from dataclasses import replace

import campaign_traces
import numpy as np
import pytest
import second_checker as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate, replanning, simulation


def problem(**more):
    """One device at 1 an hour, one at 3; a job of 6 hours with a restart of half an hour."""
    points = tuple(Rate(pool=pool, devices=1, rate=1 / 3600) for pool in ("cheap", "dear"))
    pools = (Pool(name="cheap", count=1, price=1.0), Pool(name="dear", count=1, price=3.0))
    job = Job(**{"name": "long", "work": 6.0, "throughput": points, "restart": 0.5, "deadline": 12} | more)
    return Problem(slots=12, pools=pools, jobs=(job,))


def plan(**more):
    return schedule.solve(problem(**more), gap=0.0)


def test_nothing_changed_goes_on_without_loss():
    old = plan(release=0)
    first = old.start["long"]
    new = old.replan(first + 3, gap=0.0)
    job = new.problem.jobs[0]
    assert job.done == pytest.approx(3.0) and job.running.slots == 3 and job.spent == pytest.approx(3.0)
    assert new.cost == pytest.approx(3.0) and not new.moves
    assert (new.allocation == old.allocation).all() and new.past[0]["last"] == first + 3


def test_a_pool_gone_moves_the_job_and_says_what_that_costs():
    old = plan()
    now = old.start["long"] + 2
    new = old.replan(now, {"gone": ["cheap"]}, gap=0.0)
    assert new.runs["long"][0].devices == ((1, 1),)
    assert new.cost == pytest.approx(3.0 * 5)  # 4 hours of work and half an hour of restart, whole slots
    assert new.allocation[0, 0, :now].sum() == 2


def test_diff_compares_what_is_left_and_not_the_past():
    old = plan()
    now = old.start["long"] + 2
    assert old.diff(old.replan(now, gap=0.0)) == f"cost from slot {now} on 4.00 -> 4.00 USD (+0.00)"
    moved = old.diff(old.replan(now, {"gone": ["cheap"]}, gap=0.0)).splitlines()
    assert moved[0].startswith(f"~ long: 1 x cheap [{now}, {now + 4}) -> 1 x dear [")
    assert moved[1] == f"cost from slot {now} on 4.00 -> 15.00 USD (+11.00)"
    extra = Job(name="next", work=1.0, throughput=old.problem.jobs[0].throughput)
    after = old.replan(old.finish["long"], {"jobs": [extra]}, gap=0.0)
    assert [line[:6] for line in old.diff(after).splitlines()] == ["+ next", "cost f"]  # what is done is no change


def test_measured_progress_and_throughput_count():
    old = plan()
    now = old.start["long"] + 2
    slow = {"long": [Rate(pool="cheap", devices=1, rate=0.5 / 3600, source="measured")]}
    new = old.replan(now, {"progress": {"long": 1.0}, "throughput": slow}, gap=0.0)
    assert new.problem.jobs[0].done == 1.0
    assert new.account.jobs[0].work == pytest.approx(5.0)
    assert replace(new.problem.jobs[0]).throughput[-1].source == "measured"


def test_what_runs_may_go_on_to_a_deadline_that_a_new_start_would_miss():
    old = problem(deadline=9)
    old = replace(old, pools=tuple(replace(pool, startup_hours=3.0) for pool in old.pools))
    new = schedule.solve(old, gap=0.0).replan(8, gap=0.0)
    assert new.finish == {"long": 9} and new.notes == ("throughput is assumed, not measured: long",)


def test_failed_cancelled_new_and_dearer():
    old = plan(checkpoint_every=1.0)
    now = old.start["long"] + 2
    failed = old.replan(now, {"failed": ["long"]}, gap=0.0)
    assert failed.problem.jobs[0].done == pytest.approx(1.5) and failed.runs["long"][0].lost_hours == 0.5
    more = Job(name="more", work=2.0, throughput=old.problem.jobs[0].throughput, release=now)
    other = old.replan(now, {"cancelled": ["long"], "jobs": [more]}, gap=0.0)
    assert [job.name for job in other.problem.jobs] == ["more"] and other.cost == pytest.approx(2.0)
    dearer = old.replan(now, {"prices": {"cheap": 50.0}}, gap=0.0)
    assert dearer.runs["long"][0].devices == ((1, 1),) and "from 1 x cheap: 0.5 h lost" in dearer.moves[0]
    held = old.replan(now, {"prices": {"cheap": 3.5}}, stability=10.0, gap=0.0)
    assert held.runs["long"][0].devices == ((0, 1),) and not held.moves


def test_a_deadline_that_is_lost_becomes_as_soon_as_possible():
    old = plan(deadline=7)
    new = old.replan(3, {"progress": {"long": 0.0}}, gap=0.0)
    assert any("can no longer be met" in note for note in new.notes)
    assert new.finish["long"] == 9 and new.stages[0].measure == "lateness"


def test_a_deadline_lost_to_other_jobs_is_reported():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=name, work=4.0, throughput=points, deadline=8) for name in ("a", "b"))
    old = schedule.solve(Problem(slots=12, pools=(Pool(name="p", count=1, price=1.0),), jobs=jobs), gap=0.0)
    new = old.replan(2, {"progress": {min(old.start, key=old.start.get): 0.5}}, gap=0.0)
    assert any("beside the others" in note for note in new.notes) and max(new.finish.values()) <= 11


@pytest.mark.parametrize(
    "changes, words",
    [({"failed": ["x"]}, "replan: changes.failed: is 'x'"), ({"gone": ["x"]}, "replan: changes.gone: is 'x'")],
)
def test_unknown_names_are_refused(changes, words):
    with pytest.raises(ValueError) as error:
        plan().replan(1, changes)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"speed": {}}, "replan: changes: is 'speed'"),
        ({"failed": "long"}, "replan: changes.failed: must be a list, got 'long'"),
        ({"prices": [3.0]}, "replan: changes.prices: must be a table, got [3.0]"),
        ({"progress": {"long": float("nan")}}, "replan: changes.progress.long: is nan"),
        (["long"], "replan: changes: must be a table"),
    ],
)
def test_changes_of_a_wrong_kind_are_one_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        plan().replan(1, changes)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_what_is_planned_again_equals_brute_force(seed):
    problem = replace(reference.random_problem(seed, tiny=True)[0], stability=(0.0, 0.5, 3.0)[seed % 3])
    assume(problem.slots > 2)
    now = 1 + seed % (problem.slots - 2)
    try:
        new = schedule.solve(problem, gap=0.0).replan(now, reference.changes(problem, seed), gap=0.0)
    except ValueError:  # nothing left, or no plan however late
        assume(False)
    rest = np.where(np.arange(problem.slots) < now, 0, new.allocation)
    assert reference.broken(new.problem, rest)[0] == []
    for stage, least in zip(new.stages, reference.brute_force(new.problem), strict=True):
        assert reference.isclose(stage.value, least) and stage.gap <= 1e-5


def test_what_was_spent_long_ago_still_counts():
    """A short job ends between two re-plannings: a budget of 20 has then 20 - 2 - 3 left for the long one."""
    base = problem()
    short = Job(name="short", work=2.0, throughput=(Rate(pool="dear", devices=1, rate=1 / 3600),), deadline=2)
    old = schedule.solve(replace(base, jobs=(*base.jobs, short), budget=20.0), gap=0.0)
    assert old.finish["short"] == 2
    new = old.replan(1, gap=0.0).replan(3, gap=0.0)
    assert [job.name for job in new.problem.jobs] == ["long"] and new.problem.budget == pytest.approx(20.0 - 6.0)


def test_new_jobs_may_have_replicas_and_follow_what_is_done():
    old = plan()
    now = old.finish["long"] + 1
    points = old.problem.jobs[0].throughput
    more = Job(name="more", work=1.0, throughput=points, replicas=2, after=("long",))
    other = Job(name="other", work=1.0, throughput=points)
    between = old.replan(now - 2, {"jobs": [more, other]}, gap=0.0)
    new = between.replan(now, {"jobs": [replace(more, name="last")]}, gap=0.0)
    assert {"more-1", "more-2"} <= set(between.finish) and {"last-1", "last-2"} <= set(new.finish)
    assert new.allocation.shape[0] == len(new.problem.jobs)


def test_the_past_ends_at_now():
    old = plan()
    now = old.start["long"] + 2
    (row,) = old.replan(old.problem.clock.begins(now).isoformat(), gap=0.0).past
    assert (row["last"], row["hours"]) == (now, 2.0) and row["ends"] == old.problem.clock.begins(now).isoformat()


def test_a_job_may_still_be_dropped_beside_a_lost_deadline():
    base = problem(deadline=7)
    points = base.jobs[0].throughput
    poor = Job(name="poor", work=2.0, throughput=points, value=0.5, deadline=12)
    old = schedule.solve(replace(base, jobs=(*base.jobs, poor)), gap=0.0)
    new = old.replan(3, {"progress": {"long": 0.0}}, gap=0.0)
    assert new.problem.objective.order == ("lateness", "cost") and new.dropped == ["poor"]


def test_what_runs_stops_if_its_predecessor_is_not_done_after_all():
    base = problem(deadline=None)
    points = base.jobs[0].throughput
    jobs = (
        Job(name="first", work=2.0, throughput=points, deadline=2),
        replace(base.jobs[0], work=3.0, after=("first",), deadline=5),
    )
    old = schedule.solve(replace(base, jobs=jobs), gap=0.0)
    new = old.replan(3, {"progress": {"first": 1.0}}, gap=0.0)
    assert new.start["long"] >= new.finish["first"] == 4 and new.account.jobs[1].runs[0].lost_hours == 0.5
    assert any("long: its deadline can no longer be met" in note for note in new.notes)


def test_what_a_cancelled_job_sets_free_is_said():
    base = problem()
    later = replace(base.jobs[0], name="later", after=("long",), work=1.0)
    old = schedule.solve(replace(base, jobs=(*base.jobs, later)), gap=0.0)
    new = old.replan(1, {"cancelled": ["long"]}, gap=0.0)
    assert "later: it no longer waits for long, which was cancelled" in new.notes


def test_slowdown_is_of_the_whole_job():
    """Six hours alone; half of them done when planned again: it still ends in six."""
    old = schedule.solve(replace(problem(), objective=schedule.Objective(order=("fairness",))), gap=0.0)
    assert old.value == pytest.approx(1.0) == old.replan(3, gap=0.0).value


def test_nothing_left():
    with pytest.raises(ValueError, match="nothing is left"):
        plan().replan(1, replanning.Changes(cancelled=["long"]))


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


@pytest.mark.parametrize("now", ["x", "2026-13-01T00:00"])
def test_a_now_that_is_no_time_is_named(now):
    with pytest.raises(ValueError, match=f"^replan: now: '{now}' is neither a slot nor an ISO time"):
        plan(release=0).replan(now)


@pytest.mark.parametrize("now", [None, 1.5, True])
def test_a_now_that_is_no_slot_is_named(now):
    with pytest.raises(ValueError, match="^replan: now: must be a whole number, got"):
        plan(release=0).replan(now)


@pytest.mark.parametrize("value", [None, "x", {}])
def test_only_a_problem_is_solved(value):
    with pytest.raises(ValueError, match="^solve: problem must be a bigmodel.schedule.Problem, got"):
        schedule.solve(value)
