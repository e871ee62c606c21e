"""What comes out: tables, frames, charts, sizes, and the command."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_plan import sample_plan

from bigmodel import schedule
from bigmodel.cli import main
from bigmodel.schedule import Job, Pool, Problem, Rate, plot, sizing, solver
from bigmodel.schedule.plan import StageResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan():
    return sample_plan()


def test_figures(plan):
    assert plan.cost == pytest.approx(48.0) and plan.fixed_cost == 5.0 and plan.dropped == ["spare"]
    assert plan.cost_by_job == {"first": 32.0, "second": 16.0, "spare": 0.0}
    assert plan.cost_by_owner == {"x": 32.0, "y": 16.0, "": 0.0} and plan.cost_by_pool == {"gpu": 48.0}
    assert plan.utilisation == {"gpu": 3 / 8} and plan.start == {"first": 0, "second": 4}


def test_views(plan):
    frame = plan.to_frame()
    assert len(frame) == 3 and frame["devices"].tolist() == [16, 16, 16]
    # Clocks skip an hour at 02:00: slot 3 begins at 04:00 by the wall.
    assert frame["begins"][1] == "2026-03-29T04:00:00+02:00"
    text = plan.table()
    assert "cost 48.00 USD, and 5.00 fixed" in text and "dropped: spare" in text and "CEST" in text
    data = json.loads(plan.to_json())
    assert data["cost"] == pytest.approx(48.0) and len(data["runs"]) == 3
    assert plan.diff(plan) == "cost 48.00 -> 48.00 USD (+0.00)"
    moved = plan.allocation.copy()
    moved[1] = np.roll(moved[1], 1, axis=1)
    other = replace(plan, allocation=moved)
    assert "~ second: 16 x gpu [4, 5) -> 16 x gpu [5, 6)" in plan.diff(other)


def test_prices_of_capacity():
    points = tuple(Rate(pool=p, devices=1, rate=1 / 3600) for p in ("cheap", "dear"))
    jobs = tuple(Job(name=f"j{i}", work=2.0, throughput=points) for i in range(2))
    pools = (Pool(name="cheap", count=1, price=1.0), Pool(name="dear", count=2, price=4.0))
    lines = schedule.solve(Problem(slots=2, pools=pools, jobs=jobs), gap=0.0).prices()
    assert lines[0].startswith("one more cheap would save up to 6.00 USD") and lines[1].endswith(
        "dear would save nothing"
    )


def test_charts(plan, tmp_path):
    for suffix in plot.SUFFIXES:
        plan.gantt(tmp_path / f"plan{suffix}")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "plan.svg").read_text()
    page = (tmp_path / "plan.html").read_text()
    assert page.count('class="run"') == 3 and not re.search(r"<script|https?://|src=", page)
    with pytest.raises(ValueError, match="must end in"):
        plan.gantt("plan.gif")


def test_a_chart_of_a_million_devices_is_no_larger(plan, tmp_path):
    pool = replace(plan.problem.pools[0], count=10**6)
    many = replace(plan, problem=replace(plan.problem, pools=(pool,)))
    for name in ("plan.svg", "plan.html"):
        many.gantt(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 100_000


def test_what_is_not_proven_is_said_and_is_no_number_of_json(plan):
    bare = replace(plan, stages=(StageResult("cost", 48.0, -np.inf),))
    stage = json.loads(bare.to_json(), parse_constant=pytest.fail)["stages"][0]
    assert stage == {"measure": "cost", "value": 48.0, "bound": None, "gap": None}
    assert "cost 48, nothing proven yet" in bare.table()


def test_notes_name_late_soft_deadlines_and_only_assumed_rates():
    """The two devices used are measured, the four are not; beside it, a rate between a measured and an assumed one."""
    points = tuple(
        Rate(pool="p", devices=n, rate=n / 3600, source="assumed" if n == 4 else "measured") for n in (1, 2, 4)
    )
    jobs = (
        Job(name="known", work=4.0, throughput=points, counts=(2,), deadline=1, soft=True),
        Job(name="between", work=6.0, throughput=points, counts=(3,)),
    )
    plan = schedule.solve(Problem(slots=2, pools=(Pool(name="p", count=5),), jobs=jobs), gap=0.0)
    assert plan.notes == (
        "known: ends 1 h after its deadline, which is soft",
        "lateness is not in the objective, so soft deadlines weigh nothing: known",
        "throughput is assumed, not measured: between",
    )


def test_lateness_is_told_from_the_slot_that_it_counts_from():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    job = Job(name="j", work=2.0, throughput=points, deadline="2000-01-01T01:30", soft=True)
    objective = schedule.Objective(order=("lateness", "cost"))
    problem = Problem(slots=3, pools=(Pool(name="p", count=1),), jobs=(job,), objective=objective)
    plan = schedule.solve(problem, gap=0.0)
    assert plan.notes[0] == (
        "j: ends 1 h after its deadline, which is soft, counted from Sat 2000-01-01 01:00 UTC"
    ) and not any("weigh nothing" in note for note in plan.notes)


def test_bars_share_no_lane(plan):
    problem = schedule.generate(10, 2, 24, 0.6, "B", seed=3).problem
    found = schedule.solve(problem, time_limit=2, gap=0.2)
    seen = np.zeros((2, problem.count.max(), problem.slots), dtype=int)
    for _, p, lane, devices, first, last in plot.bars(found):
        seen[p, lane : lane + devices, first:last] += 1
    assert seen.max() == 1 and (seen.sum(axis=1) == found.allocation.sum(axis=0)).all()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_estimate():
    found = schedule.estimate(7e9, 2e10, "h100", 0.4)
    assert found.hours == pytest.approx(6 * 7e9 * 2e10 / (989e12 * 0.4) / 3600)
    assert (
        found.setups["data parallel"][1] == pytest.approx(16 * 7e9 / 2**30) and found.setups["data parallel"][2] is None
    )
    assert found.setups["ZeRO-3, FSDP"][2] == 2 and found.setups["LoRA"][2] == 1
    for name, (_, _, count) in found.setups.items():
        if count is not None:
            assert sizing.memory_needed(7e9, name, count, found.activations["recomputed"]) <= 0.9 * 80
    assert all("[" in line for line in found.table().splitlines()[:5])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 1e9, "h100", 0.4), "params is 0"),
        ((1e9, float("nan"), "h100", 0.4), "tokens is nan"),
        ((1e9, 1e9, "h100", 1.5), "mfu is 1.5"),
        ((1e9, 1e9, "abacus", 0.4), "device is 'abacus'"),
        ((1e300, 1e9, "h100", 0.4), "params is 1e.300; it must be finite, above 0 and at most 1e.18"),
        ((10**400, 1e9, "h100", 0.4), "params is 1000"),
    ],
)
def test_bad_sizes(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule.estimate(*arguments)


def test_bad_shapes():
    with pytest.raises(ValueError, match="layers is -2; it must be finite, above 0"):
        schedule.estimate(1e9, 1e9, "h100", layers=-2)
    for name in ("params", "tokens", "mfu", "layers", "hidden", "sequence", "micro_batch", "most_devices"):
        with pytest.raises(ValueError, match=f"^estimate: {name} must be a number, got 'x'.$"):
            schedule.estimate(**{"params": 1e9, "tokens": 1e9, "device": "h100", name: "x"})
    with pytest.raises(ValueError, match="^estimate: device is \\[\\]; known are"):
        schedule.estimate(1e9, 1e9, [])


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments, cwd=None):
    """`bigmodel plan ...`; its status is 99 if that loaded torch."""
    script = (
        "import sys\nfrom bigmodel.cli import main\ncode = main(['plan', *sys.argv[1:]])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


SMALL = """
slots = 6
pools = [{ name = "p", count = 2, price = 1.0, gres = "gpu" }]
[[jobs]]
name = "j"
work = 7200.0
command = "true"
deadline = %d
throughput = [{ pool = "p", devices = 1, rate = 1.0 }]
"""


def test_command_plans_draws_and_emits(tmp_path):
    (tmp_path / "a.toml").write_text(SMALL % 6)
    done = command("a.toml", "--gantt", "a.html", "--json", "a.json", "--emit", "slurm", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cost 2.00 USD" in done.stdout and "one more p" in done.stdout
    assert "\r" not in done.stderr  # no progress line where there is no terminal
    assert (tmp_path / "a.html").exists() and json.loads((tmp_path / "a.json").read_text())["cost"] == 2.0
    assert (tmp_path / "run/submit.sh").stat().st_mode & 0o111


def test_exit_codes(tmp_path):
    (tmp_path / "good.toml").write_text(SMALL % 6)
    (tmp_path / "late.toml").write_text(SMALL % 1)
    (tmp_path / "bad.toml").write_text("slots = 0")
    checked = command("good.toml", "--check", cwd=tmp_path)
    assert (checked.returncode, checked.stdout.strip()) == (0, "good.toml: valid; 1 jobs, 1 pools, 6 slots")
    late = command("late.toml", cwd=tmp_path)
    assert late.returncode == 3
    assert late.stderr == (
        "j misses its deadline by 1 slot even alone on the fastest devices: a deadline of slot 2 for j "
        "(Sat 2000-01-01 02:00 UTC) would make it feasible\n"
    )
    for arguments in (["bad.toml"], ["none.toml"]):
        failed = command(*arguments, cwd=tmp_path)
        assert failed.returncode == 1 and len(failed.stderr.strip().splitlines()) == 1, failed.stderr


GOOD = "good.toml"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "a problem file is missing"),
        (["--example", GOOD], "--example takes no problem"),
        (["--example", "--check"], "--example takes no --check"),
        ([GOOD, "--check", "--emit", "slurm"], "--check takes no --emit"),
        ([GOOD, "--check", "--time-limit", "3"], "--check takes no --time-limit"),
        ([GOOD, "--out", "x"], "a plan without --emit takes no --out"),
        ([GOOD, "--params", "1e9"], "a problem, unlike 'bigmodel plan estimate', takes no --params"),
        ([GOOD, "--gantt", "x.pdf"], "--gantt: x.pdf must end in .png, .svg, .html"),
        (["estimate", "--params", "1e9"], "estimate: --tokens is missing"),
        (["estimate", "--check"], "estimate takes no --check"),
        (["estimate", "--params", "0", "--tokens", "1", "--device", "h100"], "estimate: params is 0.0"),
        ([GOOD, "--gap", "-1"], "argument --gap: is -1; it must be at least 0"),
        ([GOOD, "--time-limit", "0"], "argument --time-limit: is 0; it must be above 0"),
        ([GOOD, "--time-limit", "nan"], "argument --time-limit: is nan"),
        ([GOOD, "--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
        ([GOOD, "--emit", "cron"], "argument --emit: invalid choice"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / GOOD).write_text(SMALL % 6)
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["plan", *arguments])
    except SystemExit as error:  # argparse's own
        status = error.code
    said = capsys.readouterr()
    assert status == 2 and words in said.err and said.out == ""


@pytest.mark.parametrize(
    "problem, arguments, words",
    [
        (SMALL % 6, ["--json", "none/x"], "none/x cannot be written"),
        (SMALL % 6, ["--gantt", "none/x.html"], "none/x.html cannot be written"),
        (SMALL % 6, ["--json", "."], ". cannot be written"),
        (SMALL % 6, ["--emit", "slurm", "--out", "good.toml/x"], "good.toml/x cannot be written"),
        (SMALL % 6, ["--emit", "slurm", "--out", "old"], "old holds files of an earlier plan, such as submit.sh"),
        (SMALL % 6, ["--emit", "kueue"], "job j: image is missing"),
        (SMALL.replace('"true"', '" "') % 6, ["--emit", "slurm"], "job j: command is empty"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_solve(tmp_path, monkeypatch, capsys, problem, arguments, words):
    (tmp_path / GOOD).write_text(problem)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/submit.sh").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(solver, "solve", lambda *_, **__: pytest.fail("solved"))
    assert main(["plan", GOOD, *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("interrupted, status", [(True, 130), (False, 4)])
def test_an_interrupt_is_told_from_a_lost_process(tmp_path, monkeypatch, capsys, interrupted, status):
    """Whatever the sentence says."""
    (tmp_path / GOOD).write_text(SMALL % 6)

    def unknown(*_, **__):
        raise schedule.Unknown("uninterrupted", interrupted=interrupted)

    monkeypatch.setattr(solver, "solve", unknown)
    assert main(["plan", str(tmp_path / GOOD)]) == status


@pytest.mark.parametrize("interrupted, status", [(True, 130), (False, 0)])
def test_an_interrupted_plan_is_printed_and_told(tmp_path, monkeypatch, capsys, plan, interrupted, status):
    (tmp_path / GOOD).write_text(SMALL % 6)
    found = replace(plan, status="uninterrupted", interrupted=interrupted)
    monkeypatch.setattr(solver, "solve", lambda *_, **__: found)
    assert main(["plan", str(tmp_path / GOOD)]) == status
    assert "cost 48.00 USD" in capsys.readouterr().out


def test_example_can_be_planned_from(tmp_path):
    shown = command("--example")
    (tmp_path / "week.toml").write_text(shown.stdout)
    assert command("week.toml", "--check", cwd=tmp_path).stdout.strip().endswith("12 jobs, 4 pools, 168 slots")
    sized = command("estimate", "--params", "7e9", "--tokens", "2e10", "--device", "h100")
    assert "h100-hours" in sized.stdout and sized.returncode == 0
