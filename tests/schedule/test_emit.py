"""Files for engines: what they say, what their shell does, what is refused before there is a plan."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from sample_plan import NASTY, sample_plan

from bigmodel import schedule
from bigmodel.schedule import Job, Plan, Pool, Problem, Rate, Running, emit
from bigmodel.schedule.emit.tasks import dns_labels, of
from bigmodel.schedule.plan import StageResult


@pytest.fixture
def plan():
    return sample_plan()


def with_tools(folder, **tools):
    """An environment whose commands `tools` are bash scripts."""
    (folder / "bin").mkdir()
    for name, text in tools.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder}/bin:/usr/bin:/bin"}


def changed(plan, pool=None, **job):
    problem = plan.problem
    jobs = tuple(replace(one, **job) for one in problem.jobs)
    return replace(plan, problem=replace(problem, pools=(replace(problem.pools[0], **pool or {}),), jobs=jobs))


def test_slurm_scripts(plan, tmp_path):
    remarks = emit.write(plan, "slurm", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "first.run1.sbatch", "first.run2.sbatch", "second.run1.sbatch", "submit.sh",
    }  # fmt: skip
    script = (tmp_path / "first.run2.sbatch").read_text()
    for line in ("--nodes=2", "--gres=gpu:a100:8", "--time=70", "--partition=long"):
        assert f"#SBATCH {line}\n" in script
    assert (
        script.endswith("python a.py --resume'\n") and "--resume" not in (tmp_path / "second.run1.sbatch").read_text()
    )
    submit = (tmp_path / "submit.sh").read_text()
    assert '--dependency="afterany:$id_0" first.run2.sbatch' in submit
    assert '--dependency="afterok:$id_1" second.run1.sbatch' in submit
    assert any("image" in remark for remark in remarks) and all(f"# {remark}" in submit for remark in remarks)


def test_slurm_begins_at_the_planned_instant_whatever_the_clusters_zone(plan, tmp_path):
    """An hour after the plan's beginning by the cluster's clock: what has begun starts now, the rest after a wait."""
    emit.write(plan, "slurm", tmp_path)
    now = int(plan.problem.clock.begins(1).timestamp())
    env = with_tools(tmp_path, date=f"echo {now}", sbatch=f'echo "$*" >> {tmp_path}/asked; echo 7')
    assert subprocess.run(["bash", tmp_path / "submit.sh"], env=env | {"TZ": "Asia/Tokyo"}).returncode == 0
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[1] for line in asked] == ["--begin=now+0", "--begin=now+7200", "--begin=now+10800"]
    assert "--begin" not in re.sub("#.*submit.sh's", "", (tmp_path / "first.run2.sbatch").read_text())


def test_slurm_starts_the_command_on_every_node(plan, tmp_path):
    """srun stands in for two nodes; a single node's script needs none."""
    command = (
        'echo "it\'s $BIGMODEL_JOB $BIGMODEL_NODE of $BIGMODEL_NODES x $BIGMODEL_DEVICES $MASTER_ADDR:$MASTER_PORT" #'
    )
    emit.write(changed(plan, command=command), "slurm", tmp_path / "wide")
    emit.write(changed(plan, {"node_size": 16}, command=command), "slurm", tmp_path / "narrow")
    env = with_tools(
        tmp_path,
        scontrol='[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"',
        srun='shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
    )
    env |= {"SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "123456", "SLURM_NODEID": "0"}
    said = {}
    for folder in ("wide", "narrow"):
        script = tmp_path / folder / "first.run2.sbatch"
        said[folder] = subprocess.run(["bash", script], env=env, capture_output=True, text=True).stdout.splitlines()
    assert said == {
        "wide": ["it's first 0 of 2 x 8 n3:23456", "it's first 1 of 2 x 8 n3:23456"],
        "narrow": ["it's first 0 of 1 x 16 localhost:23456"],
    }


def test_several_nodes_are_remarked_upon(plan, tmp_path):
    for target in emit.TARGETS:
        remarks = emit.write(plan, target, tmp_path / target)
        (told,) = [remark for remark in remarks if remark.startswith("on several nodes the command is started once")]
        assert told.endswith(": first, second")


def test_a_jobs_own_environment_comes_first(plan, tmp_path):
    emit.write(changed(plan, env={"MASTER_PORT": "1", "BIGMODEL_JOB": "x"}), "slurm", tmp_path)
    script = (tmp_path / "first.run1.sbatch").read_text()
    assert script.count("MASTER_PORT=") == 1 and "export MASTER_PORT=1\n" in script and "BIGMODEL_JOB=x\n" in script


def test_copies_know_their_number(tmp_path):
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    job = Job(name="j", work=1.0, throughput=points, replicas=2, command="c", image="i")
    problem = Problem(slots=1, pools=(Pool(name="p", count=2, queue="q", model="A100"),), jobs=(job,)).expanded
    plan = Plan(problem, np.ones((2, 1, 1), dtype=int), "", (StageResult("cost", 0.0, 0.0),), True, 0.0)
    wanted = {"BIGMODEL_JOB": "j-2", "BIGMODEL_REPLICA": "2"}
    for target in emit.TARGETS:
        emit.write(plan, target, tmp_path / target)
    script = (tmp_path / "slurm/j-2.run1.sbatch").read_text()
    assert all(f"export {name}={value}\n" in script for name, value in wanted.items())
    assert wanted.items() <= yaml.safe_load((tmp_path / "skypilot/j-2.run1.yaml").read_text())["envs"].items()
    pod = yaml.safe_load((tmp_path / "kueue/j-2.run1.yaml").read_text())["spec"]["template"]["spec"]
    assert wanted.items() <= {item["name"]: item["value"] for item in pod["containers"][0]["env"]}.items()


def test_resume_stands_on_the_commands_last_line(plan, tmp_path):
    jobs = (replace(plan.problem.jobs[0], command="cd run\npython a.py\n"), *plan.problem.jobs[1:])
    emit.write(replace(plan, problem=replace(plan.problem, jobs=jobs)), "slurm", tmp_path)
    assert (tmp_path / "first.run2.sbatch").read_text().endswith("cd run\npython a.py --resume'\n")


def test_env_is_no_shell_code(plan, tmp_path):
    emit.write(plan, "slurm", tmp_path)
    export = (tmp_path / "first.run1.sbatch").read_text().split("set -euo pipefail\n")[1].split("srun")[0]
    shown = subprocess.run(["bash", "-c", f'{export}printf %s "$KEY"'], capture_output=True, text=True)
    assert shown.stdout == NASTY
    for path in tmp_path.iterdir():
        assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("target, tool", [("skypilot", "sky"), ("kueue", "kubectl")])
def test_submit_starts_each_run_at_its_time(plan, tmp_path, target, tool):
    """With a fake clock, sleep and engine: what is launched, after how long a wait, and that a failure ends nothing."""
    emit.write(plan, target, tmp_path)
    clock = tmp_path / "clock"
    clock.write_text(str(int(plan.problem.clock.begins(0).timestamp())))
    env = with_tools(
        tmp_path,
        date=f"cat {clock}",
        sleep=f"echo $(($(cat {clock}) + $1)) > {clock}.new; mv {clock}.new {clock}",
        **{tool: f'echo "$(cat {clock}) $*" >> {tmp_path}/launched; [[ "$*" != *$BROKEN* ]]'},
    )

    def launched(broken):
        done = subprocess.run(
            ["bash", tmp_path / "submit.sh"], env=env | {"BROKEN": broken}, capture_output=True, text=True
        )
        lines = [line.split() for line in (tmp_path / "launched").read_text().splitlines()][-3:]
        assert [line[-1] for line in lines] == ["first.run1.yaml", "first.run2.yaml", "second.run1.yaml"]
        return done, [int(line[0]) for line in lines]

    done, times = launched("nothing")
    assert done.returncode == 0 and times == [int(plan.problem.clock.begins(s).timestamp()) for s in (0, 3, 4)]
    done, _ = launched("first.run1")
    assert done.returncode == 1 and done.stderr.startswith(f"submit.sh: failed: {tool} ")
    assert len(done.stderr.splitlines()) == 1


def test_skypilot_tasks(plan, tmp_path):
    emit.write(plan, "skypilot", tmp_path)
    task = yaml.safe_load((tmp_path / "first.run2.yaml").read_text())
    assert task["resources"]["accelerators"] == "A100:8" and task["num_nodes"] == 2 and task["resources"]["use_spot"]
    assert task["envs"]["KEY"] == NASTY and "--resume" in task["run"] and "timeout 4200 " in task["run"]


def test_skypilot_tells_each_node_where_it_is(plan, tmp_path):
    emit.write(changed(plan, command='echo "$BIGMODEL_NODE $MASTER_ADDR" #'), "skypilot", tmp_path)
    run = yaml.safe_load((tmp_path / "first.run2.yaml").read_text())["run"]
    env = {"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    assert subprocess.run(["bash", "-c", run], env=env, capture_output=True, text=True).stdout == "1 10.0.0.7\n"


def test_names_that_engines_take():
    names = ["7b.run1", "Train_A.run2", "x" * 63 + ".run1", "x-" * 31 + "x.run12"]
    labels = dns_labels(names)
    assert list(labels.values())[:2] == ["j-7b-run1", "train-a-run2"]
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) <= 58 for label in labels.values())
    with pytest.raises(ValueError, match="a-b.run1: as a label, 'a-b-run1', its name is that of A_b.run1 too"):
        dns_labels(["A_b.run1", "a-b.run1"])


@pytest.mark.slow
def test_skypilot_itself_reads_them(plan, tmp_path):
    """In an environment of its own: BIGMODEL_SKY names its Python, or one is made (minutes)."""

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
    """On two nodes each: a Service gives the pods names by which they find each other."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    emit.write(plan, "kueue", tmp_path)
    names = set()
    for path in tmp_path.glob("*.yaml"):
        service, job = yaml.safe_load_all(path.read_text())
        for item in (service, job):
            validate.validate(item, "1.29", strict=True)
        assert job["spec"]["suspend"] is True and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
        name = job["metadata"]["name"]
        names.add(name)
        assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
        pod = job["spec"]["template"]["spec"]
        assert pod["subdomain"] == service["metadata"]["name"] and job["spec"]["completionMode"] == "Indexed"
        container = pod["containers"][0]
        assert f"MASTER_ADDR={name}-0.{name} " in container["command"][-1]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "ephemeral-storage": "80G"}
    assert names == {"first-run1", "first-run2", "second-run1"}


def test_kueue_needs_no_service_on_one_node(plan, tmp_path):
    emit.write(changed(plan, {"node_size": 16}), "kueue", tmp_path)
    job = yaml.safe_load((tmp_path / "first.run1.yaml").read_text())
    assert job["kind"] == "Job" and "completionMode" not in job["spec"]
    assert "subdomain" not in job["spec"]["template"]["spec"]


def as_kubernetes(text, env):
    """What it makes of a container's command: https://pkg.go.dev/k8s.io/kubernetes/third_party/forked/golang/expansion"""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


def test_kubernetes_hands_over_every_dollar(plan, tmp_path):
    emit.write(changed(plan, command="echo \"$(KEY) $$ $KEY\" '$$(KEY)'"), "kueue", tmp_path)
    *_, job = yaml.safe_load_all((tmp_path / "first.run1.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert as_kubernetes(env["KEY"], {"HOME": "gone"}) == NASTY
    script = as_kubernetes(container["command"][-1], env)
    assert script.endswith("\necho \"$(KEY) $$ $KEY\" '$$(KEY)'") and "=${JOB_COMPLETION_INDEX:-0} " in script


@pytest.mark.parametrize(
    "target, pool, job, words",
    [
        ("slurm", {}, {"command": " "}, "job first: command is empty"),
        (
            "slurm",
            {"kind": "tpu", "gres": None},
            {},
            "pool gpu: gres is missing, Slurm's name for devices of kind 'tpu'",
        ),
        ("kueue", {"kind": "npu"}, {}, "pool gpu: kind is 'npu'; for Kubernetes it is cpu, gpu, tpu, fpga"),
        ("kueue", {}, {"image": ""}, "image is missing"),
        ("kueue", {"queue": None}, {}, "queue is missing"),
        ("kueue", {"queue": "a b"}, {}, "queue is 'a b', which is no Kubernetes label"),
        ("skypilot", {"accelerator": None}, {}, "accelerator is missing"),
        ("nomad", {}, {}, "target is 'nomad'"),
    ],
)
def test_what_a_target_needs(plan, tmp_path, target, pool, job, words):
    with pytest.raises(ValueError, match=words):
        emit.write(changed(plan, pool, **job), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_files_of_two_plans_do_not_mix(plan, tmp_path):
    """The first plan's submit.sh may still be up, and reads its files as their times come."""
    emit.write(plan, "skypilot", tmp_path)
    (tmp_path / "mine.txt").write_text("")
    for left in ("submit.sh", "second.run1.yaml"):
        with pytest.raises(
            FileExistsError, match=f"holds files of an earlier plan, such as {left}; name another folder"
        ):
            emit.write(plan, "slurm", tmp_path)
        (tmp_path / left).unlink()
    for path in tmp_path.glob("*.yaml"):
        path.unlink()
    emit.write(plan, "slurm", tmp_path)


def test_a_plan_that_begins_in_the_past_says_so(plan):
    (told,) = [remark for remark in of(plan).remarks if "begun" in remark]
    assert told == "3 of 3 runs should have begun by now, first.run1 first: they start at once"
    later = replace(plan, problem=replace(plan.problem, start="2099-03-29T00:00"))
    assert not [remark for remark in of(later).remarks if "begun" in remark]


def replanned(plan, **more):
    """The plan seen again from slot 4: run 2 of `first`, begun in slot 3, goes on until 6, and a third follows."""
    problem = plan.problem
    going = Running(pool="gpu", devices=16, slots=1)
    first = replace(problem.jobs[0], work=4.0, done=1.0, started=True, **{"running": going} | more)
    table = np.zeros((2, 1, 8), dtype=int)
    table[0, 0, [0, 3, 4, 5, 7]] = table[1, 0, 6] = 16
    table[0, 0, 7] = 8
    problem = replace(problem, now=4, jobs=(first, replace(problem.jobs[1], after=())))
    return replace(plan, problem=problem, allocation=table)


def test_what_runs_is_not_submitted_again(plan, tmp_path):
    remarks = emit.write(replanned(plan), "slurm", tmp_path)
    assert {path.name for path in tmp_path.glob("*.sbatch")} == {"first.run3.sbatch", "second.run1.sbatch"}
    assert "sbatch first.run2" not in (tmp_path / "submit.sh").read_text()
    assert (tmp_path / "first.run3.sbatch").read_text().endswith("python a.py --resume\n")
    assert remarks[:3] == [
        "planned again from Sun 2026-03-29 05:00 CEST: end the earlier submit.sh and cancel what it submitted, but for "
        "first.run2",
        "first.run2 runs already and is not submitted again: leave it until Sun 2026-03-29 07:00 CEST, which the time "
        "limit that it was given may not reach",
        "first.run3 follows first.run2, which runs already: only its time holds it back",
    ]


@pytest.mark.parametrize("devices", [8, None])
def test_what_moves_or_failed_is_submitted_under_the_next_number(plan, devices):
    """It ran on 8 devices and goes on with 16; or it failed, and begins again as it was."""
    running = devices and Running(pool="gpu", devices=devices, slots=1)
    told = of(replanned(plan, running=running))
    assert [task.name for task in told.tasks] == ["first.run3", "second.run1", "first.run4"]
    assert told.tasks[0].resumes and told.remarks[0].endswith("end the earlier submit.sh and cancel what it submitted")


def test_a_planned_again_plan_numbers_on(tmp_path):
    """As `replan` makes it: run 1 goes on, and what waits for it is told that it cannot."""
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = (
        Job(name="a", work=3.0, throughput=points, command="a"),
        Job(name="b", work=1.0, throughput=points, command="b", after=("a",)),
    )
    problem = Problem(slots=6, pools=(Pool(name="p", count=1),), jobs=jobs)
    plan = schedule.solve(problem, gap=0.0).replan(1)
    told = of(plan)
    assert [task.name for task in told.tasks] == ["b.run1"] and told.tasks[0].after == ()
    assert "b.run1 follows a.run1, which runs already: only its time holds it back" in told.remarks


def test_tasks_wait_for_the_last_run_before(plan):
    tasks = {task.name: task for task in of(plan).tasks}
    assert tasks["second.run1"].after == ("first.run2",) and tasks["first.run2"].previous == ("first.run1",)
