"""Time limits, interrupts, and the solver's process."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from bigmodel import schedule
from bigmodel.schedule import cures, instance, mip, programmes, search, weighing, worker


def test_time_limit_holds_and_says_so():
    problem = schedule.generate(40, 4, 120, 0.85, "C", seed=1).problem
    begin = time.monotonic()
    try:
        plan = schedule.solve(problem, time_limit=3, gap=0.0)
        assert not plan.complete and "time ran out" in plan.status
    except schedule.Unknown:
        pass  # on a crowded machine three seconds may be too few
    assert time.monotonic() - begin < 3 + 2.5  # 0.5 s on a quiet machine; this one may be crowded


def test_ctrl_c_returns_the_best_plan_so_far():
    script = (
        # What a shell starts in the background inherits a SIGINT that is ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bigmodel import schedule; p = schedule.generate(40, 4, 120, .6, 'B', seed=1).problem\n"
        "def tell(value, bound, seconds):\n    if value < 1e300: print('incumbent', flush=True)\n"
        "plan = schedule.solve(p, time_limit=60, gap=0.0, progress=tell)\n"
        "print(plan.status, plan.account.violations, plan.interrupted)"
    )
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert child.stdout.readline() == "incumbent\n"
    begin = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: every process of the group
    rest, errors = child.communicate(timeout=30)
    assert errors == ""  # nor does the solver's process complain
    assert "; interrupted after" in rest and "[] True" in rest and child.returncode == 0
    assert time.monotonic() - begin < 5


def test_an_answer_that_nobody_waited_for_blocks_nothing():
    """Both pipes full: a large answer is being written while the next large question is."""
    solver_process = worker.Worker()
    n = 200_000
    program = {"c": np.ones(n), "bounds": np.stack([np.ones(n), np.full(n, 2.0)], axis=1), "method": "highs"}
    try:
        with pytest.raises(worker.Overdue):
            solver_process.call("linprog", program, -1.0)
        assert solver_process.call("linprog", program | {"c": np.full(n, 2.0)}, 60)["value"] == pytest.approx(2 * n)
    finally:
        solver_process.kill()


def test_a_call_that_the_process_does_not_take_is_overdue():
    """It has stopped; what does not fit into the pipe must not be waited for without end."""
    solver_process, n = worker.Worker(), 50_000
    program = {"c": np.ones(n), "bounds": np.stack([np.ones(n), np.full(n, 2.0)], axis=1), "method": "highs"}
    try:
        assert solver_process.call("linprog", program, 60)["value"] == pytest.approx(n)
        os.kill(solver_process._child.pid, signal.SIGSTOP)
        signal.alarm(60)  # the test ends without the mend, too: by this signal
        with pytest.raises(worker.Overdue):
            solver_process.call("linprog", program, 0.0)
        assert solver_process.call("linprog", program, 60)["value"] == pytest.approx(n)
    finally:
        signal.alarm(0)
        solver_process.kill()


class Recorded:
    """A worker that answers each call with `status` after a fifth of a second, and without a point."""

    def __init__(self, status):
        self.status, self.limits = status, []

    def begin(self, kind, arguments, limit):
        self.limits.append(arguments["options"]["time_limit"])

    def finish(self, limit):
        time.sleep(0.2)
        return {"status": self.status, "x": None, "bound": None}


def test_the_second_look_of_milp_has_what_the_first_left():
    recorded = Recorded(2)
    assert mip.solve(recorded, {}, 1.0).infeasible
    assert recorded.limits[0] <= 1.0 and recorded.limits[1] <= 0.8


@pytest.mark.parametrize("status, late", [(1, True), (4, False)])
def test_only_the_clock_makes_a_neighbourhoods_answer_late(status, late):
    """Taken up after its time, but ended by its number of nodes: another run ends likewise."""
    problem = schedule.generate(2, 1, 12, 0.3, "B").problem
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    run = search.Search(inst, Recorded(status), time.monotonic() + 1.0, 0.0)
    pending = run._send(programmes.Programme({}, 0.0, lambda x: None))
    time.sleep(0.3)  # a fifth of the time is the programme's
    assert run._collect(pending) is None and run.cut == late


def test_a_relaxation_that_nobody_waits_for_is_ended():
    """Time runs out while the first plan is made: the next stage finds the solver's process free."""
    problem = schedule.generate(2, 1, 12, 0.3, "B").problem
    inst = instance.build(problem, instance.stage_for(problem, {"cost": 1.0}))
    solver_process = worker.Worker()
    assert search.Search(inst, solver_process, time.monotonic() - 1.0, 0.0).run().cut
    assert solver_process._child is None


def test_no_time_limit_at_all():
    assert schedule.solve(schedule.generate(2, 1, 12, 0.3, "B").problem, time_limit=float("inf"), gap=1.0).complete


def _lost_at(monkeypatch, call):
    """The solver's process is killed from outside before its answer to the `call`-th question is read."""
    asked = 0
    receive = worker.Worker._receive

    def killed(self, end):
        nonlocal asked
        asked += 1
        if asked == call:
            self._child.kill()
            self._child.wait()
            while os.read(self._child.stdout.fileno(), 1 << 20):
                pass  # an answer that it had written already
            self._inbox = b""
        return receive(self, end)

    monkeypatch.setattr(worker, "_shared", worker.Worker())
    monkeypatch.setattr(worker.Worker, "_receive", killed)


def test_the_plan_survives_the_solvers_process(monkeypatch):
    problem = schedule.generate(20, 3, 48, 0.6, "C", seed=1).problem
    _lost_at(monkeypatch, 6)
    plan = schedule.solve(problem, time_limit=20, gap=0.0)
    assert "; stopped after" in plan.status and "since the solver's process ended" in plan.status
    assert not plan.complete and not plan.interrupted
    assert plan.account.violations == [] and plan.gap < 0.5
    assert schedule.solve(problem, time_limit=20, gap=0.1).complete  # the next has a new process


def test_without_a_plan_the_lost_process_is_named(monkeypatch):
    _lost_at(monkeypatch, 1)
    monkeypatch.setattr(search.Search, "_offer", lambda self, state: None)
    with pytest.raises(schedule.Unknown, match="stopped, since the solver's process ended"):
        schedule.solve(schedule.generate(5, 2, 24, 0.5, "B", seed=1).problem, time_limit=20)


@pytest.fixture(params=["order", "weights"])
def bisected(request):
    weights = {"cost": 1.0, "makespan": 1.0}
    objective = (
        schedule.Objective(weights=weights) if request.param == "weights" else schedule.Objective(order=("makespan",))
    )
    return replace(schedule.generate(12, 2, 36, 0.4, "B", seed=1).problem, objective=objective)


@pytest.mark.parametrize("probe", [1, 2])
def test_ctrl_c_in_a_bisection_returns_its_plan(monkeypatch, bisected, probe):
    """A probe is interrupted in which a plan has been found."""
    sweep, probes = search.Search._first, 0

    def interrupted(self):
        nonlocal probes
        probes += 1
        if probes == probe:
            raise KeyboardInterrupt
        return sweep(self)

    monkeypatch.setattr(search.Search, "_first", interrupted)
    monkeypatch.setattr(search.Search, "closed", lambda self: False)  # nor is it over with the first plan
    plan = schedule.solve(bisected, time_limit=20)
    assert "; interrupted after" in plan.status and plan.account.violations == []


def test_a_lost_process_in_a_bisection_returns_its_plan(monkeypatch, bisected):
    _lost_at(monkeypatch, 1)
    plan = schedule.solve(bisected, time_limit=20)
    assert "since the solver's process ended" in plan.status and plan.account.violations == []


def test_ctrl_c_between_the_floors_and_the_weighing_keeps_the_plan_that_weighs_least(monkeypatch):
    problem = schedule.generate(12, 2, 36, 0.4, "B", seed=1).problem
    weights = {"cost": 1.0, "makespan": 1.0, "fairness": 1.0}
    problem = replace(problem, objective=schedule.Objective(weights=weights))
    offered, offer = [], weighing.Weighing._offer

    def noted(self, plan):
        better = offer(self, plan)
        offered.append((self.value, plan))
        return better

    def interrupted(self, box, end):
        raise KeyboardInterrupt

    monkeypatch.setattr(weighing.Weighing, "_offer", noted)
    monkeypatch.setattr(weighing.Weighing, "_look", interrupted)
    plan = schedule.solve(problem, time_limit=20)
    assert "; interrupted after" in plan.status and len(offered) == 2
    assert plan.value == pytest.approx(offered[-1][0])


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), worker.Lost("gone")], ids=["interrupt", "lost"])
def test_what_is_proven_impossible_stays_so_if_the_cures_are_cut_off(monkeypatch, stop):
    def cut_off(*arguments):
        raise stop

    monkeypatch.setattr(cures, "stretches", cut_off)
    planted = schedule.generate(6, 2, 24, 0.5, "B", seed=1).problem
    jobs = tuple(replace(job, work=job.work * 50) for job in planted.jobs)
    with pytest.raises(schedule.Infeasible) as found:
        schedule.solve(replace(planted, jobs=jobs), time_limit=20)
    assert found.value.reasons and not found.value.suggestions


def test_a_process_without_memory_is_a_lost_one(monkeypatch):
    """A MemoryError in it is no answer: it ends, and whoever asked hears that it has."""
    import io
    import pickle

    payload = pickle.dumps((7, "linprog", {}))
    asked = io.TextIOWrapper(io.BytesIO(worker._HEADER.pack(len(payload)) + payload))

    def full(kind, arguments):
        raise MemoryError

    monkeypatch.setattr(worker, "_answer", full)
    monkeypatch.setattr(sys, "stdin", asked)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    replies = []
    monkeypatch.setattr(worker, "_reply", lambda sink, message: replies.append(message))
    worker.main()
    assert replies == [(0, {})]
