"""Problems without a plan: the reasons, and the changes that would give one."""

import re
import time
from dataclasses import replace

import campaign_infeasible
import numpy as np
import pytest

from bigmodel import schedule
from bigmodel.schedule import (
    Job,
    Pool,
    Problem,
    Rate,
    explain,
    files,
    improve,
    instance,
    rules,
    search,
    stretch,
    worker,
)
from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.state import State


def _points(pool="p", *counts):
    return tuple(Rate(pool=pool, devices=n, rate=n / 3600) for n in counts or (1,))


def _refused(problem, **options):
    with pytest.raises(schedule.Infeasible) as error:
        schedule.solve(problem, **options)
    return error.value


@pytest.mark.parametrize("seed", range(10))
def test_the_planted_cause_is_among_the_suggestions(seed):
    record = campaign_infeasible.trial(10_000 + seed)
    assert record["found"], record
    assert 1 <= len(record["suggestions"]) <= 3


def test_suggestions_are_the_least_that_helps():
    """Two jobs of two hours on one device by slot 3: one hour short."""
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = tuple(Job(name=name, work=2.0, throughput=points, deadline=3) for name in ("a", "b"))
    problem = Problem(slots=6, pools=(Pool(name="p", count=1, price=2.0),), jobs=jobs, budget=7.0)
    with pytest.raises(schedule.Infeasible) as error:
        schedule.solve(replace(problem, budget=None))
    text = " / ".join(error.value.suggestions)
    assert re.search(r"a deadline of slot 4 for [ab] ", text) and "1 more p-hour before slot" in text
    assert "budget" not in text and error.value.reasons[0].startswith(
        "a and b need 4 device-hours of p in slots 0 to 2"
    )
    late = (jobs[0], replace(jobs[1], deadline=4))
    schedule.solve(replace(problem, jobs=late, budget=None))
    schedule.solve(replace(problem, pools=(Pool(name="p", count={"slots": [2, 1, 1, 1, 1, 1]}),), budget=None))
    with pytest.raises(schedule.Infeasible) as error:
        schedule.solve(replace(problem, jobs=late))
    (suggestion,) = error.value.suggestions
    assert suggestion == "a budget of 8.00 USD instead of 7.00"
    # No family cures it alone: the budget with either of the others does.
    with pytest.raises(schedule.Infeasible) as error:
        schedule.solve(problem)
    assert len(error.value.suggestions) == 2
    assert all(text.endswith(" and a budget of 8.00 USD instead of 7.00") for text in error.value.suggestions)


@pytest.mark.parametrize(
    "job, words",
    [
        ({"memory": 100.0}, "fits on no pool"),
        ({"counts": (3,)}, "fits on no pool"),
        ({"deadline": 1}, "misses its deadline by 1 slot even alone"),
        ({"work": 9.0}, "misses the horizon's end by 3 slots even alone"),
        ({"budget": 0.5}, "costs at least"),
    ],
)
def test_cheap_tests_name_the_job(job, words):
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    pool = Pool(name="p", count=1, price=1.0, memory=80.0)
    problem = Problem(slots=6, pools=(pool,), jobs=(Job(**{"name": "j", "work": 2.0, "throughput": points} | job),))
    with pytest.raises(schedule.Infeasible) as error:
        schedule.solve(problem)
    assert words in error.value.reasons[0] and error.value.reasons[0].startswith("j ")


def test_what_rules_a_job_out_is_said():
    pools = (Pool(name="p", count=16, node_size=8), Pool(name="q", count=16, memory=24.0))
    job = Job(name="j", work=2.0, throughput=_points("p", 12) + _points("q", 1), memory=40.0)
    (reason,) = _refused(Problem(slots=6, pools=pools, jobs=(job,))).reasons
    assert (
        "p gives more than a node of 8 by whole nodes" in reason and "q has 24 GiB a device, and it needs 40" in reason
    )
    assert "0 GiB" not in reason


def test_a_chain_past_the_horizon_is_named_and_has_no_cure():
    jobs = [Job(name=name, work=3.0, throughput=_points(), after=after) for name, after in (("a", ()), ("b", ("a",)))]
    refused = _refused(Problem(slots=5, pools=(Pool(name="p", count=1),), jobs=tuple(jobs)))
    assert refused.reasons == [
        "a and b, one after the other and on the fastest devices, miss the horizon's end by 1 slot"
    ]
    assert refused.suggestions == []
    due = (jobs[0], replace(jobs[1], deadline=5))
    refused = _refused(Problem(slots=9, pools=(Pool(name="p", count=1),), jobs=due))
    assert "miss the deadline of b by 1 slot" in refused.reasons[0]
    assert refused.suggestions == ["a deadline of slot 6 for b (Sat 2000-01-01 06:00 UTC)"]


def test_work_that_exceeds_all_devices_is_counted():
    jobs = tuple(Job(name=name, work=2.0, throughput=_points(), deadline=3) for name in ("a", "b"))
    (cause,) = explain.necessary(Problem(slots=6, pools=(Pool(name="p", count=1),), jobs=jobs))
    assert cause.text == "a and b need 4 device-hours of p in slots 0 to 2, which have 3"
    assert cause.families == {"capacity", "deadlines"}


def test_what_conflicts_is_named_where_only_a_solver_proves_it():
    """Two unbroken jobs of two devices beside one that takes the middle slot: 7 of 9 device-hours, and no room."""
    jobs = tuple(Job(name=f"j{i}", work=2.0, throughput=_points(), preemptible=False) for i in range(2))
    jobs += (Job(name="mid", work=1.0, throughput=_points(), release=1, deadline=2),)
    pool = Pool(name="p", count={"slots": [1, 1, 1, 0, 1, 1]}, price=1.0)
    problem = Problem(slots=6, pools=(pool,), jobs=jobs)
    assert _refused(problem).reasons == ["no plan within capacity meets every deadline"]
    endless = replace(
        problem, jobs=(*jobs[:2], replace(jobs[2], deadline=None, release=0, work=2.0, preemptible=False))
    )
    assert explain.together(endless).text == "no plan within capacity ends before the horizon does"
    assert explain.together(replace(problem, budget=9.0)).text.endswith("meets every deadline and the budget")


def test_singular_and_plural():
    pool, job = Pool(name="g", count=1, quota_group="q"), Job(name="j", work=1.0, throughput=_points("g"))
    problem = Problem(slots=4, pools=(pool,), quotas={"q": 1}, jobs=(job,))
    extra = stretch.Devices(0, 1, (0, 1, 0, 0))
    assert extra.text(problem) == "1 more g-hour before slot 2 (up to 1 more device from slot 1)"
    assert stretch.Quota("q", 1).text(problem) == "a quota of 1 device for q"
    assert stretch.Quota("q", 2).text(problem) == "a quota of 2 devices for q"


@pytest.mark.parametrize(
    "paid, told", [(8.0, "8.00"), (8.001, "8.01"), (850.36, "850.40"), (12344.1, "12350.00"), (0.0123, "0.013")]
)
def test_a_budget_is_rounded_up_at_a_sensible_digit(paid, told):
    money = stretch.Money.least(0, paid)
    assert money.told() == told and float(told) == money.limit >= paid


def test_changes_apply_to_what_they_name():
    jobs = tuple(Job(name=n, work=2.0, throughput=_points(), owner="o", budget=b) for n, b in (("a", None), ("b", 1.0)))
    problem = Problem(slots=4, pools=(Pool(name="p", count=1),), jobs=jobs, budgets={"o": 2.0}, budget=3.0)
    changes = [stretch.Money(row, 9, 0) for row in range(3)] + [
        stretch.Deadline(0, 4),
        stretch.Devices(0, 1, (2, 0, 1, 0)),
    ]
    changed = stretch.made(problem, changes)
    assert (changed.jobs[1].budget, changed.budgets, changed.budget) == (9.0, {"o": 9.0}, 9.0)
    assert changed.jobs[0].deadline == 4 and changed.count.tolist() == [[2, 1, 2, 1]]
    assert [(row.job, row.owner) for row in rules.budgets(problem)] == [(1, None), (None, "o"), (None, None)]


@pytest.mark.parametrize(
    "change, suggestion",
    [
        ({"job": "pretrain-7b", "deadline": "2026-03-03T22:00"}, "a deadline of slot 50 for pretrain-7b "),
        ({"job": "tokenize", "deadline": "2026-03-02T10:00"}, "a deadline of slot 15 for tokenize "),
        ({"budget": 300.0}, r"a budget of \d+\.\d\d EUR instead of 300.00$"),
    ],
)
def test_one_field_of_the_example_changed(change, suggestion):
    problem = files.from_dict(files.toml().loads(files.example()))
    if "job" in change:
        j = problem.job_index(change["job"])
        jobs = (*problem.jobs[:j], replace(problem.jobs[j], deadline=change["deadline"]), *problem.jobs[j + 1 :])
        changed = replace(problem, jobs=jobs)
    else:
        changed = replace(problem, **change)
    refused = _refused(changed, time_limit=6)
    assert len(refused.suggestions) == 1 and re.match(suggestion, refused.suggestions[0])
    assert not any("finetune" in reason for reason in refused.reasons)
    if "budget" in change:
        assert any("none within the budget of 300.00" in reason for reason in refused.reasons)


def test_a_capacity_that_is_too_small_for_a_week_is_cured():
    """Far above the columns up to which the elastic programme is solved."""
    problem, _, words = campaign_infeasible.plant_week(2)
    refused = _refused(problem, time_limit=6)
    assert any(words in text for text in refused.suggestions)


def test_a_budget_near_the_least_is_met():
    """The first plan of the example costs 1,192."""
    problem = replace(files.from_dict(files.toml().loads(files.example())), budget=950.0).expanded
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    found = search.Search(inst, worker.shared(), time.monotonic() + 20, gap=1e9)
    found._eased(inst.stage.implied)
    assert found.value <= 950.0 and not found.infeasible


def test_what_is_lost_by_dropping_a_job_is_in_no_budget():
    """With both jobs the least cost is 15, far above the budget of 6, under which one is dropped."""
    jobs = (
        Job(name="must", work=5.0, throughput=_points()),
        Job(name="may", work=10.0, throughput=_points(), value=100.0),
    )
    problem = Problem(slots=15, pools=(Pool(name="p", count=1, price=1.0),), jobs=jobs, budget=6.0)
    plan = schedule.solve(problem)
    assert plan.dropped == ["may"] and plan.value == pytest.approx(105.0)


def test_what_exceeds_an_owners_budget_is_worked_off():
    """Two jobs, each for two slots; the cheap pool has room for one, and the budget needs it to be the owner's. Nothing
    that is minimised makes either pool better."""
    pools = (Pool(name="q", count=1, price=2.0), Pool(name="p", count=1, price=1.0))
    points = _points("p") + _points("q")
    jobs = tuple(Job(name=name, work=2.0, throughput=points, owner=name, deadline=2) for name in ("a", "b"))
    problem = Problem(slots=2, pools=pools, jobs=jobs, budgets={"b": 2.0})
    inst = instance.build(problem, instance.stage_for(problem, {"lateness": 1.0}))
    plan = State.holding(inst, {0: ((0, 1, 1), (1, 1, 1)), 1: ((0, 0, 1), (1, 0, 1))})
    assert plan.score()[1] > 0
    improve.thrifty(plan, Prices.zero(inst), seed=0)
    assert plan.score()[:2] == (0, 0.0)


def test_a_held_slot_after_the_work_is_trimmed():
    problem = Problem(slots=3, pools=(Pool(name="p", count=1),), jobs=(Job(name="j", work=1.0, throughput=_points()),))
    held = np.array([[[1, 1, 1]]])
    assert rules.check(problem, held).jobs[0].idle == 1
    assert rules.trimmed(problem, held).tolist() == [[[1, 0, 0]]]
