"""Planning again from where the jobs are."""

from dataclasses import replace

import numpy as np
import pytest
import second_checker as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import plan, problem

from bigmodel import schedule
from bigmodel.schedule import Changes, Job, Objective, Pool, Problem, Rate


def test_nothing_changed_goes_on_without_loss():
    old = plan(release=0)
    first = old.start["long"]
    new = old.replan(first + 3, gap=1e-6)
    job = new.problem.jobs[0]
    assert job.done == pytest.approx(3.0) and job.running.slots == 3 and job.spent == pytest.approx(3.0)
    assert new.cost == pytest.approx(3.0) and not new.moves
    assert (new.allocation == old.allocation).all() and new.past[0]["last"] == first + 3


def test_a_pool_gone_moves_the_job_and_says_what_that_costs():
    old = plan()
    now = old.start["long"] + 2
    new = old.replan(now, {"gone": ["cheap"]}, gap=1e-6)
    assert new.runs["long"][0].devices == ((1, 1),)
    assert new.cost == pytest.approx(3.0 * 5)  # 4 hours of work and half an hour of restart, whole slots
    assert new.allocation[0, 0, :now].sum() == 2


def test_diff_compares_what_is_left_and_not_the_past():
    old = plan()
    now = old.start["long"] + 2
    assert old.diff(old.replan(now, gap=1e-6)) == f"cost from slot {now} on 4.00 -> 4.00 USD (+0.00)"
    moved = old.diff(old.replan(now, {"gone": ["cheap"]}, gap=1e-6)).splitlines()
    assert moved[0].startswith(f"~ long: 1 x cheap [{now}, {now + 4}) -> 1 x dear [")
    assert moved[1] == f"cost from slot {now} on 4.00 -> 15.00 USD (+11.00)"
    extra = Job(name="next", work=1.0, throughput=old.problem.jobs[0].throughput)
    after = old.replan(old.finish["long"], {"jobs": [extra]}, gap=1e-6)
    assert [line[:6] for line in old.diff(after).splitlines()] == ["+ next", "cost f"]  # what is done is no change


def test_measured_progress_and_throughput_count():
    old = plan()
    now = old.start["long"] + 2
    slow = {"long": [Rate(pool="cheap", devices=1, rate=0.5 / 3600, source="measured")]}
    new = old.replan(now, {"progress": {"long": 1.0}, "throughput": slow}, gap=1e-6)
    assert new.problem.jobs[0].done == 1.0
    assert new.account.jobs[0].work == pytest.approx(5.0)
    assert replace(new.problem.jobs[0]).throughput[-1].source == "measured"


def test_what_runs_may_go_on_to_a_deadline_that_a_new_start_would_miss():
    old = problem(deadline=9)
    old = replace(old, pools=tuple(replace(pool, startup_hours=3.0) for pool in old.pools))
    new = schedule.solve(old, gap=1e-6).replan(8, gap=1e-6)
    assert new.finish == {"long": 9} and new.notes == ("throughput is assumed, not measured: long",)


def test_failed_cancelled_new_and_dearer():
    old = plan(checkpoint_every=1.0)
    now = old.start["long"] + 2
    failed = old.replan(now, {"failed": ["long"]}, gap=1e-6)
    assert failed.problem.jobs[0].done == pytest.approx(1.5) and failed.runs["long"][0].lost_hours == 0.5
    more = Job(name="more", work=2.0, throughput=old.problem.jobs[0].throughput, release=now)
    other = old.replan(now, {"cancelled": ["long"], "jobs": [more]}, gap=1e-6)
    assert [job.name for job in other.problem.jobs] == ["more"] and other.cost == pytest.approx(2.0)
    dearer = old.replan(now, {"prices": {"cheap": 50.0}}, gap=1e-6)
    assert dearer.runs["long"][0].devices == ((1, 1),) and "from 1 x cheap: 0.5 h lost" in dearer.moves[0]
    held = old.replan(now, {"prices": {"cheap": 3.5}}, stability=10.0, gap=1e-6)
    assert held.runs["long"][0].devices == ((0, 1),) and not held.moves


def test_a_deadline_that_is_lost_becomes_as_soon_as_possible():
    old = plan(deadline=7)
    new = old.replan(3, {"progress": {"long": 0.0}}, gap=1e-6)
    assert any("can no longer be met" in note for note in new.notes)
    assert new.finish["long"] == 9 and new.stages[0].measure == "lateness"


def test_a_deadline_lost_to_other_jobs_is_reported():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=name, work=4.0, throughput=points, deadline=8) for name in ("a", "b"))
    old = schedule.solve(Problem(slots=12, pools=(Pool(name="p", count=1, price=1.0),), jobs=jobs), gap=1e-6)
    new = old.replan(2, {"progress": {min(old.start, key=old.start.get): 0.5}}, gap=1e-6)
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
        new = schedule.solve(problem, gap=1e-6).replan(now, reference.changes(problem, seed), gap=1e-6)
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
    old = schedule.solve(replace(base, jobs=(*base.jobs, short), budget=20.0), gap=1e-6)
    assert old.finish["short"] == 2
    new = old.replan(1, gap=1e-6).replan(3, gap=1e-6)
    assert [job.name for job in new.problem.jobs] == ["long"] and new.problem.budget == pytest.approx(20.0 - 6.0)


def test_new_jobs_may_have_replicas_and_follow_what_is_done():
    old = plan()
    now = old.finish["long"] + 1
    points = old.problem.jobs[0].throughput
    more = Job(name="more", work=1.0, throughput=points, replicas=2, after=("long",))
    other = Job(name="other", work=1.0, throughput=points)
    between = old.replan(now - 2, {"jobs": [more, other]}, gap=1e-6)
    new = between.replan(now, {"jobs": [replace(more, name="last")]}, gap=1e-6)
    assert {"more-1", "more-2"} <= set(between.finish) and {"last-1", "last-2"} <= set(new.finish)
    assert new.allocation.shape[0] == len(new.problem.jobs)


def test_the_past_ends_at_now():
    old = plan()
    now = old.start["long"] + 2
    (row,) = old.replan(old.problem.clock.begins(now).isoformat(), gap=1e-6).past
    assert (row["last"], row["hours"]) == (now, 2.0) and row["ends"] == old.problem.clock.begins(now).isoformat()


def test_a_job_may_still_be_dropped_beside_a_lost_deadline():
    base = problem(deadline=7)
    points = base.jobs[0].throughput
    poor = Job(name="poor", work=2.0, throughput=points, value=0.5, deadline=12)
    old = schedule.solve(replace(base, jobs=(*base.jobs, poor)), gap=1e-6)
    new = old.replan(3, {"progress": {"long": 0.0}}, gap=1e-6)
    assert new.problem.objective.order == ("lateness", "cost") and new.dropped == ["poor"]


def test_what_runs_stops_if_its_predecessor_is_not_done_after_all():
    base = problem(deadline=None)
    points = base.jobs[0].throughput
    jobs = (
        Job(name="first", work=2.0, throughput=points, deadline=2),
        replace(base.jobs[0], work=3.0, after=("first",), deadline=5),
    )
    old = schedule.solve(replace(base, jobs=jobs), gap=1e-6)
    new = old.replan(3, {"progress": {"first": 1.0}}, gap=1e-6)
    assert new.start["long"] >= new.finish["first"] == 4 and new.account.jobs[1].runs[0].lost_hours == 0.5
    assert any("long: its deadline can no longer be met" in note for note in new.notes)


def test_what_a_cancelled_job_sets_free_is_said():
    base = problem()
    later = replace(base.jobs[0], name="later", after=("long",), work=1.0)
    old = schedule.solve(replace(base, jobs=(*base.jobs, later)), gap=1e-6)
    new = old.replan(1, {"cancelled": ["long"]}, gap=1e-6)
    assert "later: it no longer waits for long, which was cancelled" in new.notes


def test_slowdown_is_of_the_whole_job():
    """Six hours alone; half of them done when planned again: it still ends in six."""
    old = schedule.solve(replace(problem(), objective=schedule.Objective(order=("fairness",))), gap=1e-6)
    assert old.value == pytest.approx(1.0) == old.replan(3, gap=1e-6).value


def test_nothing_left():
    with pytest.raises(ValueError, match="nothing is left"):
        plan().replan(1, Changes(cancelled=["long"]))


@pytest.mark.parametrize("job", [{"preemptible": False}, {"min_run": 3}])
@pytest.mark.parametrize("lost", [{"counts": {"g": 1}}, {"counts": {"g": {"slots": [2, 2, *[1] * 8]}}}])
def test_of_two_runs_that_may_not_be_broken_off_the_more_urgent_keeps_the_device(job, lost):
    """One of two devices goes, now or before either has ended."""
    point = (Rate(pool="g", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=name, work=4.0, throughput=point, deadline=due, **job) for name, due in (("a", 9), ("b", 8)))
    pools = (Pool(name="g", count=2, price={"slots": [1.0] * 4 + [5.0] * 6}),)
    old = schedule.solve(Problem(slots=10, pools=pools, jobs=jobs), gap=1e-6)
    assert old.start == {"a": 0, "b": 0}
    new = old.replan(1, lost, gap=1e-6)
    assert new.runs["b"][0].first == 1 and new.start["a"] == 4
    assert "a: is interrupted, since its 1 x g are no longer there" in new.notes
    first = replace(jobs[0], priority=2.0)
    other = replace(old, problem=replace(old.problem, jobs=(first, jobs[1]))).replan(1, lost, gap=1e-6)
    assert other.start["a"] == 1 and other.problem.jobs[1].running is None


def test_a_quota_is_handed_out_too_and_rates_that_are_gone_end_a_run():
    points = tuple(Rate(pool=pool, devices=n, rate=n / 3600) for pool in ("g", "h") for n in (1, 2))
    jobs = tuple(Job(name=name, work=8.0, throughput=points, preemptible=False, deadline=4) for name in ("a", "b"))
    pools = tuple(Pool(name=name, count=2, price=1.0, quota_group="q") for name in ("g", "h"))
    old = schedule.solve(Problem(slots=20, pools=pools, jobs=jobs, quotas={"q": 4}), gap=1e-6)
    less = replace(old, problem=replace(old.problem, quotas={"q": 2})).replan(1, gap=1e-6)
    assert [job.running is None for job in less.problem.jobs] == [False, True]
    gone = old.replan(1, {"throughput": {"b": [Rate(pool=pool, devices=1, rate=1 / 3600) for pool in "gh"]}}, gap=1e-6)
    assert "b: is interrupted, since it may no longer run on 2 x " in " ".join(gone.notes)


def test_an_owners_budget_outlives_his_jobs():
    point = (Rate(pool="g", devices=1, rate=1 / 3600),)
    jobs = (
        Job(name="a", work=4.0, throughput=point, owner="x", deadline=4),
        Job(name="y", work=9.0, throughput=point, owner="y"),
    )
    pools = (Pool(name="g", count=2, price=2.0),)
    old = schedule.solve(Problem(slots=12, pools=pools, jobs=jobs, budgets={"x": 10.0}), gap=1e-6).replan(4, gap=1e-6)
    assert old.problem.budgets == {"x": pytest.approx(2.0)}
    new = Job(name="z", work=1.0, throughput=point, owner="x")
    assert old.replan(5, {"jobs": [new]}, gap=1e-6).cost_by_owner["x"] == pytest.approx(2.0)
    with pytest.raises(schedule.Infeasible, match="budget of owner x"):
        old.replan(5, {"jobs": [replace(new, work=2.0)]}, gap=1e-6)
    at_once = schedule.solve(old.problem, gap=1e-6).replan(4, {"cancelled": ["y"], "jobs": [new]}, gap=1e-6)
    assert at_once.problem.budgets == {"x": pytest.approx(2.0)}


def test_a_failed_job_loses_the_work_of_every_pool_it_mixed():
    points = tuple(Rate(pool=pool, devices=1, rate=1 / 3600) for pool in "gh")
    job = Job(name="a", work=8.0, throughput=points, mix_pools=True, checkpoint_every=2.0)
    pools = tuple(Pool(name=name, count=1, price=1.0) for name in "gh")
    soonest = Objective(order=("makespan",))
    old = schedule.solve(Problem(slots=20, pools=pools, jobs=(job,), objective=soonest), gap=1e-6)
    assert old.replan(3, {"failed": ["a"]}, gap=1e-6).problem.jobs[0].done == pytest.approx(4.0)


def test_changes_may_be_tables_as_in_a_file():
    old = plan()
    point = {"pool": "cheap", "devices": 1, "rate": 2 / 3600, "source": "measured"}
    job = {"name": "more", "work": 1.0, "throughput": [point], "after": ["long"]}
    new = old.replan(old.start["long"] + 1, {"throughput": {"long": [point]}, "jobs": [job]}, gap=1e-6)
    assert new.problem.jobs[0].throughput[-1] == Rate(**point) and new.problem.jobs[1].after == ("long",)
    assert Changes.of({"jobs": [job]}).jobs == (Job(**job | {"throughput": (Rate(**point),), "after": ("long",)}),)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"throughput": {"long": [{"pool": "cheap"}]}}, "replan: changes.throughput.long[0].devices: is missing."),
        ({"throughput": {"long": "x"}}, "replan: changes.throughput.long: must be a list, got 'x'."),
        ({"throughput": {"long": [3]}}, "replan: changes.throughput.long[0]: must be a table, got 3."),
        ({"jobs": [{"name": "c"}]}, "replan: changes.jobs[0].work: is missing."),
        ({"jobs": [{"name": "c", "speed": 1}]}, "replan: changes.jobs[0].speed: is no field"),
        ({"jobs": [Job(name="c", work=1.0, throughput=(), after="long")]}, "replan: changes.jobs[0].after: must be"),
        ({"jobs": [Job(name="long", work=1.0, throughput=())]}, "replan: changes.jobs[0].name: 'long' is the name"),
        ({"failed": [3]}, "replan: changes.failed[0]: must be text"),
        ({"progress": {"long": "1"}}, "replan: changes.progress.long: must be a number, got '1'."),
    ],
)  # fmt: skip
def test_broken_tables_of_changes_are_one_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        plan().replan(1, changes)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words", [({"failed": "ab"}, "failed: must be a list"), ({"progress": ["a"]}, "progress: must be a table")]
)
def test_changes_check_their_kinds_themselves(changes, words):
    with pytest.raises(ValueError, match=f"replan: changes.{words}"):
        Changes(**changes)


@pytest.mark.parametrize("now", ["foo", "2000-13-01", None, 2.5])
def test_now_is_a_slot_or_a_time(now):
    with pytest.raises(ValueError, match="^replan: now: "):
        plan().replan(now)


def test_a_weighted_objective_weighs_lateness_once():
    """`a` cannot be in time any more, and `b` not beside it."""
    whole = {"work": 4.0, "throughput": (Rate(pool="p", devices=1, rate=1 / 3600),), "preemptible": False}
    jobs = (Job(name="a", deadline=4, **whole), Job(name="b", deadline=8, **whole))
    problem = Problem(slots=16, pools=(Pool(name="p", count=1),), jobs=jobs, objective=Objective(weights={"cost": 1.0}))
    new = schedule.solve(problem, gap=1e-6).replan(1, {"progress": {"a": 0.0}}, gap=1e-6)
    assert new.softened == ("a", "b") and new.problem.objective.weights == {"cost": 1.0, "lateness": 1000.0}
    assert new.wished == Objective(weights={"cost": 1.0})


def test_a_deadline_may_be_taken_away_from_a_soft_job():
    new = plan(soft=True).replan(1, {"deadlines": {"long": None}}, gap=1e-6)
    assert new.problem.jobs[0].deadline is None and not new.problem.jobs[0].soft


def test_what_the_planner_softened_is_hard_again_by_another_deadline():
    """And the objective is the one that was asked for; what the user gave as soft stays soft."""
    lost = plan(deadline=7).replan(3, {"progress": {"long": 0.0}}, gap=1e-6)
    assert lost.softened == ("long",) and lost.problem.objective.order == ("lateness", "cost")
    still = lost.replan(4, gap=1e-6)
    assert still.softened == ("long",) and still.problem.jobs[0].soft
    hard = still.replan(5, {"deadlines": {"long": 11}}, gap=1e-6)
    assert hard.softened == () and not hard.problem.jobs[0].soft and hard.problem.objective == Objective()
    assert hard.finish["long"] <= 11
    again = still.replan(5, {"deadlines": {"long": 6}}, gap=1e-6)
    assert again.softened == ("long",) and any("can no longer be met" in note for note in again.notes)
    free = still.replan(5, {"deadlines": {"long": None}}, gap=1e-6)
    assert free.softened == () and not free.problem.jobs[0].soft and free.problem.objective == Objective()
    assert plan(soft=True).replan(1, {"deadlines": {"long": 11}}, gap=1e-6).problem.jobs[0].soft


@pytest.mark.parametrize("value", [None, "x", {}])
def test_only_a_problem_is_solved(value):
    with pytest.raises(ValueError, match="^solve: problem must be a bigmodel.schedule.Problem, got"):
        schedule.solve(value)
