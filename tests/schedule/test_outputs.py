"""What comes out: tables, frames, charts, files for engines, sizes, and the command."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate, emit, plot, sizing
from bigmodel.schedule.emit.tasks import of
from bigmodel.schedule.plan import StageResult

ROOT = Path(__file__).resolve().parents[2]
NASTY = 'it\'s $(touch /tmp/never) `x` "y" \\'


@pytest.fixture(scope="module")
def plan():
    """Three jobs: `first` in two runs on two nodes, `second` after it, `spare` dropped."""
    gpus = (Rate(pool="gpu", devices=16, rate=1 / 3600), Rate(pool="gpu", devices=8, rate=0.6 / 3600))
    more = {"image": "train:1", "data_gb": 80.0}
    jobs = (
        Job(name="first", work=2.0, throughput=gpus, command="python a.py", env={"KEY": NASTY}, owner="x", **more),
        Job(name="second", work=1.0, throughput=gpus, command="python b.py", after=("first",), owner="y", **more),
        Job(name="spare", work=1.0, throughput=gpus, value=0.1, command="c", **more),
    )
    pool = Pool(
        name="gpu", count=16, price=[1.0] * 12 + [2.0] * 12, node_size=8, ownership="spot", partition="long",
        gres="gpu:a100",        accelerator="A100", queue="team", fixed_cost=5.0, interruptions_per_hour=0.0,
    )  # fmt: skip
    problem = Problem(slots=8, start="2026-03-29T00:00", tz="Europe/Berlin", pools=(pool,), jobs=jobs)
    table = np.zeros((3, 1, 8), dtype=int)
    table[0, 0, [0, 3]] = table[1, 0, 4] = 16
    found = schedule.solve(problem, gap=0.0)
    found = replace(found, allocation=table)
    found.__dict__.pop("account", None)
    assert found.account.violations == []
    return found


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
        "throughput is assumed, not measured: between",
    )


def test_bars_share_no_lane(plan):
    problem = schedule.generate(10, 2, 24, 0.6, "B", seed=3).problem
    found = schedule.solve(problem, time_limit=2, gap=0.2)
    seen = np.zeros((2, problem.count.max(), problem.slots), dtype=int)
    for _, p, lane, devices, first, last in plot.bars(found):
        seen[p, lane : lane + devices, first:last] += 1
    assert seen.max() == 1 and (seen.sum(axis=1) == found.allocation.sum(axis=0)).all()


def test_slurm_scripts(plan, tmp_path):
    remarks = emit.write(plan, "slurm", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "first.run1.sbatch", "first.run2.sbatch", "second.run1.sbatch", "submit.sh",
    }  # fmt: skip
    script = (tmp_path / "first.run2.sbatch").read_text()
    for line in ("--nodes=2", "--gres=gpu:a100:8", "--time=70", "--partition=long"):
        assert f"#SBATCH {line}\n" in script
    assert script.endswith("python a.py --resume\n") and "--resume" not in (tmp_path / "second.run1.sbatch").read_text()
    submit = (tmp_path / "submit.sh").read_text()
    assert '--dependency="afterany:$id_0" first.run2.sbatch' in submit
    assert '--dependency="afterok:$id_1" second.run1.sbatch' in submit
    assert any("image" in remark for remark in remarks) and all(f"# {remark}" in submit for remark in remarks)


def test_slurm_begins_at_the_planned_instant_whatever_the_clusters_zone(plan, tmp_path):
    """An hour after the plan's beginning by the cluster's clock: what has begun starts now, the rest after a wait."""
    emit.write(plan, "slurm", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "date").write_text(f"#!/bin/bash\necho {int(plan.problem.clock.begins(1).timestamp())}\n")
    (tools / "sbatch").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\necho 7\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "TZ": "Asia/Tokyo"}
    assert subprocess.run(["bash", tmp_path / "submit.sh"], env=env).returncode == 0
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[1] for line in asked] == ["--begin=now+0", "--begin=now+7200", "--begin=now+10800"]
    assert "--begin" not in re.sub("#.*submit.sh's", "", (tmp_path / "first.run2.sbatch").read_text())


def test_resume_stands_on_the_commands_last_line(plan, tmp_path):
    jobs = (replace(plan.problem.jobs[0], command="cd run\npython a.py\n"), *plan.problem.jobs[1:])
    emit.write(replace(plan, problem=replace(plan.problem, jobs=jobs)), "slurm", tmp_path)
    assert (tmp_path / "first.run2.sbatch").read_text().endswith("cd run\npython a.py --resume\n")


def test_env_is_no_shell_code(plan, tmp_path):
    emit.write(plan, "slurm", tmp_path)
    export = (tmp_path / "first.run1.sbatch").read_text().split("set -euo pipefail\n")[1].split("python a.py")[0]
    shown = subprocess.run(["bash", "-c", f'{export}printf %s "$KEY"'], capture_output=True, text=True)
    assert shown.stdout == NASTY
    for path in tmp_path.iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_submit_starts_each_run_at_its_time(plan, tmp_path):
    """With a fake clock, sleep and sky: what is launched, and after how long a wait."""
    emit.write(plan, "skypilot", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    clock = tmp_path / "clock"
    clock.write_text(str(int(plan.problem.clock.begins(0).timestamp())))
    (tools / "date").write_text(f"#!/bin/bash\ncat {clock}\n")
    (tools / "sleep").write_text(f"#!/bin/bash\necho $(($(cat {clock}) + $1)) > {clock}.new; mv {clock}.new {clock}\n")
    (tools / "sky").write_text(f'#!/bin/bash\necho "$(cat {clock}) $*" >> {tmp_path}/launched\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin"}
    assert subprocess.run(["bash", tmp_path / "submit.sh"], env=env).returncode == 0
    launched = [line.split() for line in (tmp_path / "launched").read_text().splitlines()]
    assert [int(line[0]) for line in launched] == [int(plan.problem.clock.begins(s).timestamp()) for s in (0, 3, 4)]
    assert [line[-1] for line in launched] == ["first.run1.yaml", "first.run2.yaml", "second.run1.yaml"]


def test_skypilot_tasks(plan, tmp_path):
    emit.write(plan, "skypilot", tmp_path)
    task = yaml.safe_load((tmp_path / "first.run2.yaml").read_text())
    assert task["resources"]["accelerators"] == "A100:8" and task["num_nodes"] == 2 and task["resources"]["use_spot"]
    assert task["envs"] == {"KEY": NASTY} and "--resume" in task["run"] and "timeout 4200 " in task["run"]


@pytest.mark.slow
def test_skypilot_itself_reads_them(plan, tmp_path):
    """In an environment of its own: BIGMODEL_SKY names its Python, or one is made (minutes)."""
    import os

    python = os.environ.get("BIGMODEL_SKY")
    if python is None:
        home = tmp_path / "sky"
        made = subprocess.run([sys.executable, "-m", "venv", home]).returncode == 0
        python = str(home / "bin/python")
        if not made or subprocess.run([python, "-m", "pip", "install", "-q", "skypilot"]).returncode:
            pytest.skip("SkyPilot cannot be installed here")
    folder = tmp_path / "out"
    emit.write(plan, "skypilot", folder)
    script = (
        "import sys, sky\nfor path in sys.argv[1:]:\n    t = sky.Task.from_yaml(path)\n"
        "    r = next(iter(t.resources)); print(t.name, t.num_nodes, dict(r.accelerators), r.use_spot)"
    )
    files = sorted(str(path) for path in folder.glob("*.yaml"))
    shown = subprocess.run([python, "-c", script, *files], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.splitlines()[-3] == "first-run1 2 {'A100': 8} True"


def test_kueue_jobs_are_valid(plan, tmp_path):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    emit.write(plan, "kueue", tmp_path)
    names = set()
    for path in tmp_path.glob("*.yaml"):
        job = yaml.safe_load(path.read_text())
        validate.validate(job, "1.29", strict=True)
        assert job["spec"]["suspend"] is True and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
        names.add(job["metadata"]["name"])
    assert names == {"first-run1", "first-run2", "second-run1"}
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "ephemeral-storage": "80G"}


@pytest.mark.parametrize(
    "target, pool, job, words",
    [
        ("slurm", {}, {"command": " "}, "command: is empty"),
        ("kueue", {}, {"image": ""}, "image is missing"),
        ("kueue", {"queue": None}, {}, "queue is missing"),
        ("kueue", {"queue": "a b"}, {}, "queue is 'a b', which is no Kubernetes label"),
        ("skypilot", {"accelerator": None}, {}, "accelerator is missing"),
        ("nomad", {}, {}, "target is 'nomad'"),
    ],
)
def test_what_a_target_needs(plan, tmp_path, target, pool, job, words):
    problem = plan.problem
    jobs = tuple(replace(one, **job) for one in problem.jobs)
    changed = replace(plan, problem=replace(problem, pools=(replace(problem.pools[0], **pool),), jobs=jobs))
    with pytest.raises(ValueError, match=words):
        emit.write(changed, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_wait_for_the_last_run_before(plan):
    tasks = {task.name: task for task in of(plan).tasks}
    assert tasks["second.run1"].after == ("first.run2",) and tasks["first.run2"].previous == ("first.run1",)


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
    ],
)
def test_bad_sizes(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule.estimate(*arguments)


def test_bad_shapes():
    with pytest.raises(ValueError, match="layers is -2; it must be finite and above 0"):
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
    for arguments in (["bad.toml"], ["none.toml"], [], ["good.toml", "--mfu", "0.5"], ["estimate", "--params", "1e9"]):
        failed = command(*arguments, cwd=tmp_path)
        assert failed.returncode == 1 and len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert command("good.toml", "--emit", "cron", cwd=tmp_path).returncode == 2


def test_example_can_be_planned_from(tmp_path):
    shown = command("--example")
    (tmp_path / "week.toml").write_text(shown.stdout)
    assert command("week.toml", "--check", cwd=tmp_path).stdout.strip().endswith("12 jobs, 4 pools, 168 slots")
    sized = command("estimate", "--params", "7e9", "--tokens", "2e10", "--device", "h100")
    assert "h100-hours" in sized.stdout and sized.returncode == 0
