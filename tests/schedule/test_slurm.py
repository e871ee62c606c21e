"""An emitted plan on a real Slurm: it is accepted, and its runs come in order."""

from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import slurm_cluster

from bigmodel.schedule import Job, Plan, Pool, Problem, Rate, emit
from bigmodel.schedule.plan import StageResult

MISSING = slurm_cluster.missing()


def small_plan():
    """Two GPUs of one pool: `first` in two runs with a pause, then `second`; `other` beside them. Slots of 6 seconds
    that lie in the past, so that --begin holds nothing back and order is the dependencies' work."""
    start = (datetime.now(timezone.utc) - timedelta(hours=2)).strftime("%Y-%m-%dT%H:%M:%S")

    def job(name, slots, **more):
        rate = Rate(pool="gpu", devices=1, rate=1.0)
        command = f"echo start {name} $(date +%s.%N) >> order; sleep 1; echo end {name} $(date +%s.%N) >> order; echo "
        return Job(name=name, work=slots * 6.0, throughput=(rate,), command=command, **more)

    jobs = (job("first", 2), job("second", 1, after=("first",), env={"GREETING": "a 'b' $c"}), job("other", 2))
    pool = Pool(name="gpu", count=2, partition="test", gres="gpu", node_size=4)
    problem = Problem(slots=6, slot_hours=6 / 3600, start=start, pools=(pool,), jobs=jobs)
    allocation = np.zeros((3, 1, 6), dtype=int)
    allocation[0, 0, [0, 2]] = allocation[1, 0, 3] = 1
    allocation[2, 0, [0, 1]] = 1
    plan = Plan(problem, allocation, "", (StageResult("cost", 0.0, 0.0),), True, 0.0)
    assert not plan.account.violations
    return plan


def wide_plan():
    """One run on two nodes of two GPUs; its command tells from each node what it knows of the others."""
    start = (datetime.now(timezone.utc) - timedelta(hours=2)).strftime("%Y-%m-%dT%H:%M:%S")
    command = 'echo "it\'s $BIGMODEL_NODE of $BIGMODEL_NODES x $BIGMODEL_DEVICES, $SLURMD_NODENAME $MASTER_ADDR"'
    rate = Rate(pool="gpu", devices=4, rate=1.0)
    pool = Pool(name="gpu", count=4, partition="test", gres="gpu", node_size=2)
    job = Job(name="wide", work=6.0, throughput=(rate,), command=command)
    problem = Problem(slots=1, slot_hours=6 / 3600, start=start, pools=(pool,), jobs=(job,))
    return Plan(problem, np.full((1, 1, 1), 4), "", (StageResult("cost", 0.0, 0.0),), True, 0.0)


def run_plan(plan: Plan, folder: Path, **shape) -> dict[str, str]:
    """Submits the plan to a fresh cluster; its outputs by run."""
    import subprocess

    emit.write(plan, "slurm", folder)
    with slurm_cluster.cluster(**shape) as env:
        env = env | {"TZ": "UTC"}
        submitted = subprocess.run(["bash", folder / "submit.sh"], env=env, capture_output=True, text=True)
        assert submitted.returncode == 0, submitted.stderr
        slurm_cluster.wait_empty(env, 60)
    return {path.name.rsplit("-", 1)[0]: path.read_text() for path in folder.glob("*.out")}


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_slurm_runs_an_emitted_plan_in_order(tmp_path):
    outputs = run_plan(small_plan(), tmp_path)
    times = {}
    for line in (tmp_path / "order").read_text().splitlines():
        event, name, when = line.split()
        times.setdefault((event, name), []).append(float(when))
    assert len(times["start", "first"]) == 2 and len(times["end", "other"]) == 1
    assert times["end", "first"][0] <= times["start", "first"][1]
    assert times["end", "first"][1] <= times["start", "second"][0]
    assert times["start", "other"][0] < times["end", "first"][1]  # nothing made it wait
    assert set(outputs) == {"first.run1", "first.run2", "second.run1", "other.run1"}
    assert outputs["first.run1"].strip() == "" and outputs["first.run2"].strip() == "--resume"


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_slurm_runs_the_command_on_every_node(tmp_path):
    outputs = run_plan(wide_plan(), tmp_path, nodes=2, gpus=2)
    assert sorted(outputs["wide.run1"].splitlines()) == ["it's 0 of 2 x 2, n0 n0", "it's 1 of 2 x 2, n1 n0"]
