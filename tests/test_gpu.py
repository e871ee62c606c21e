"""`make gpu` where there is no GPU: its stages on the CPU, and their record."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from fake_tools import ROOT, tool
from gpu import command, exercise, machine, stages, text
from gpu.record import Record, write_journal

import bigmodel
from bigmodel import cli, info
from bigmodel.benchmarks.journal import Progress, read, supervise

# A group of benchmarks with one small case, in every process that has this on its path.
ONE_CASE = """
import bigmodel.benchmarks as benchmarks
original = benchmarks.load_group
def load_group(name):
    module = original(name)
    if hasattr(module, "_case") and name == "norm":
        import torch
        case = "rms_norm", "forward kernel", torch.float32, (6, 64)
        module.cases = lambda device, **flags: [module._case(device, *case)]
    return module
benchmarks.load_group = load_group
"""

# As compute-sanitizer takes its options: two words each, then the command.
SANITIZER = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --log-file ]] && log=${2//%p/$$}; [[ $1 == --tool ]] && tool=$2; shift 2; done
"$@" || exit
[[ $tool == initcheck ]] && echo "========= Uninitialized __global__ memory read of size 4 bytes" > "$log"
echo "========= ERROR SUMMARY: $([[ $tool == initcheck ]] && echo 1 || echo 0) errors" >> "$log"
"""


@pytest.fixture
def clean_tree(monkeypatch):
    monkeypatch.setattr(machine, "tree", lambda: ("0123456789ab", False))


@pytest.fixture(scope="module")
def here():
    return machine.look("cpu")


@pytest.fixture
def built(tmp_path, clean_tree, here):
    """The folder that the build stage would leave: this environment's package stands for the one built."""
    site = tmp_path / "work" / "site"
    site.mkdir(parents=True)
    (site / "bigmodel").symlink_to(Path(bigmodel.__file__).parent)
    (site / "sitecustomize.py").write_text(ONE_CASE)
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    facts = {"schema": 1, "date": "2030-01-01", "commit": "0123456789ab", "facts": info.collect(), "stages": {}}
    (folder / "2030-01-01.json").write_text(json.dumps(facts))
    (tmp_path / "work" / "built").write_text(f"0123456789ab {here.to_dict()}")
    return tmp_path


def run(folder, *arguments):
    base = ["--device", "cpu", "--results", str(folder / "results"), "--work", str(folder / "work")]
    return command.main([*base, *arguments])


def record_of(folder):
    (path,) = (folder / "results" / "cpu").glob("*.json")
    return json.loads(path.read_text())


def test_every_stage_runs_and_leaves_what_it_found(built, monkeypatch, capsys):
    tool(built / "bin", "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", str(built / "bin"), prepend=os.pathsep)
    tests = built / "test_two.py"
    tests.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_lacking(): import no_such_module\n"
        "def test_skipped(): pytest.skip('no need')\n"
    )
    (built / "test_uncollected.py").write_text("import no_such_module_either\n")
    names = "test bench-norm sanitize model"
    folder = built / "results" / "cpu"
    assert run(built, "--stages", names, "--tests", str(built), "--budget", "400") == 1
    record = record_of(built)
    found = record["stages"]
    assert {name: stage["state"] for name, stage in found.items()} == dict.fromkeys(names.split(), "done")

    outcomes = {item.split("::")[-1]: result["outcome"] for item, result in found["test"]["done"].items()}
    assert outcomes == {
        "test_right": "passed", "test_wrong": "failed", "test_lacking": "left out", "test_skipped": "skipped",
    }  # fmt: skip
    (uncollected,) = found["test"]["errors"].items()
    assert "test_uncollected.py (not collected)" in uncollected[0] and "no_such_module_either" in uncollected[1]

    (row,) = [result["row"] for result in found["bench-norm"]["done"].values()]
    assert row["case"] == "rms_norm forward kernel float32 6x64" and set(row["times"]) == {"bigmodel", "copy"}
    assert "goals" in found["bench-norm"]

    assert found["sanitize"]["errors"] == {} and found["sanitize"]["left"] == []
    assert len(found["sanitize"]["done"]) == 3 * len(dict(exercise.exercises("cpu")))
    assert {tool: each["errors"] for tool, each in found["sanitize"]["tools"].items()} == {
        "memcheck": 0, "racecheck": 0, "initcheck": 1,
    }  # fmt: skip
    assert list(found["model"]["done"]) == ["stock 1", "converted 1", "stock 2", "converted 2"]
    assert [turn["replaced"] for turn in found["model"]["done"].values()] == [0, 5, 0, 5]

    page = (folder / "2030-01-01.md").read_text()
    for words in (
        "| model",
        "tokens/s",
        "rms_norm forward kernel float32 6x64",
        "Uninitialized __global__",
        "test_wrong",
    ):
        assert words in page
    pytest.importorskip("matplotlib")
    assert (folder / "2030-01-01-norm.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    before = (folder / "2030-01-01.json").read_text()
    assert run(built, "--stages", names, "--tests", str(built)) == 1  # what failed is still told
    said = capsys.readouterr().out
    assert said.count("done for this commit") == 3 and "make gpu: test: up to" in said  # a file was not collected
    after = json.loads((folder / "2030-01-01.json").read_text())["stages"]
    assert after | {"test": None} == json.loads(before)["stages"] | {"test": None}
    assert after["test"]["done"] == found["test"]["done"] and after["test"]["errors"] == found["test"]["errors"]
    path = str(folder / "2030-01-01.json")
    assert cli.main(["bench", "--compare", path, path]) == 0
    assert "## Moved: 0 of 1 cases" in capsys.readouterr().out


def test_tests_after_a_lost_context_run_in_another_process(tmp_path):
    """A kernel that faults leaves every later call of its process failing."""
    tests, path = tmp_path / "test_three.py", tmp_path / "journal"
    tests.write_text(
        "import os\n"
        "def test_faults(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_next(): print(os.getpid())\n"
        "def test_crashes(): os.abort()\n"
        "def test_last(): pass\n"
    )
    code = (
        "import os, sys, pytest, gpu.pytest_journal as plugin\n"
        "plugin._context_lost = lambda: True\n"
        "options = ['-q', '-p', 'gpu.pytest_journal', '-p', 'no:cacheprovider', sys.argv[1]]\n"
        "sys.exit(pytest.main([*options, '--rootdir', os.path.dirname(sys.argv[1])]))\n"
    )
    env = os.environ | {"BIGMODEL_JOURNAL": str(path), "PYTHONPATH": str(ROOT / "bench")}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", code, str(tests)]
        assert supervise(command, path, seconds=60, stall=30, log=log, env=env) is None
    progress = read(path)
    assert {item.split("::")[1]: found["outcome"] for item, found in progress.done.items()} == {
        "test_faults": "failed", "test_next": "passed", "test_last": "passed",
    }  # fmt: skip
    assert "illegal memory access" in next(iter(progress.done.values()))["why"]
    assert progress.errors == {"test_three.py::test_crashes": "the process died of SIGABRT"}
    assert (tmp_path / "log").read_text().count("the CUDA context is lost") == 1


# --- which stages run, and with how much time -------------------------------------------------------------------------


@pytest.fixture
def steps(built, here, monkeypatch):
    """Stages that journal at once what `plan` says, and note their time."""
    plan = {name: {"plan": ["a"], "done": ["a"], "ending": None} for name in stages.STAGES}
    plan["build"] = {"plan": ["facts"], "done": ["facts"], "ending": None}
    ran = []

    def stage(work, seconds):
        ran.append((work.name, seconds, work.known))
        mine = plan[work.name]
        path = work.context.work / f"{work.name}.jsonl"
        if "signal" in mine:
            signal.raise_signal(mine["signal"])
        if "skip" in mine:
            raise stages.Skipped(mine["skip"])
        done = {item: {"facts": {}} for item in mine["done"]}
        write_journal(path, Progress(mine["plan"], done, mine.get("errors", {})))
        work.journals.append(path)
        return mine["ending"]

    monkeypatch.setattr(machine, "look", lambda device: here)
    monkeypatch.setattr(command, "STAGES", dict.fromkeys(stages.STAGES, stage))
    monkeypatch.setattr(command, "_render", lambda record, context: [])
    return plan, ran


def names(ran):
    return [name for name, _, _ in ran]


def test_what_is_done_for_the_commit_is_not_done_again(built, steps):
    _, ran = steps
    assert run(built) == 0
    assert names(ran) == list(stages.STAGES)
    ran.clear()
    assert run(built) == 0 and ran == []
    assert run(built, "--stages", "model", "--again") == 0 and names(ran) == ["model"]


def test_another_commit_or_a_changed_tree_starts_over(built, steps, monkeypatch, capsys):
    _, ran = steps
    assert run(built) == 0
    for tree in (("ba9876543210", False), ("ba9876543210", True), ("ba9876543210", True)):
        ran.clear()
        monkeypatch.setattr(machine, "tree", lambda tree=tree: tree)
        assert run(built) == 0 and names(ran) == list(stages.STAGES)
    assert "the tree was changed since the commit" in capsys.readouterr().out
    assert len(list((built / "results" / "cpu").glob("*.json"))) == 4


def test_a_stage_that_was_cut_off_goes_on(built, steps):
    plan, ran = steps
    plan["model"] = {"plan": ["a", "b"], "done": ["a"], "ending": None}
    assert run(built) == 1
    assert record_of(built)["stages"]["model"]["state"] == "partial"
    assert record_of(built)["stages"]["model"]["left"] == ["b"]
    ran.clear()
    plan["model"] = {"plan": ["a", "b"], "done": ["a", "b"], "ending": None}
    assert run(built) == 0 and names(ran) == ["model"]
    assert list(ran[0][2].done) == ["a"]


def test_a_record_that_lacks_its_facts_is_built_again(built, steps):
    _, ran = steps
    (built / "results" / "cpu" / "2030-01-01.json").unlink()
    assert run(built, "--stages", "model") == 0 and names(ran) == ["build", "model"]
    assert "facts" in record_of(built)


def test_what_broke_off_is_tried_again_by_the_next_run(built, steps):
    plan, ran = steps
    stall = {"plan": ["a", "b"], "done": ["a"], "errors": {"b": "no end within 90 s"}, "ending": None}
    plan["model"] = stall
    assert run(built) == 1 and record_of(built)["stages"]["model"]["state"] == "done"
    ran.clear()
    plan["model"] = {"plan": ["a", "b"], "done": ["a", "b"], "ending": None}
    assert run(built) == 0 and names(ran) == ["model"]
    assert list(ran[0][2].done) == ["a"] and ran[0][2].errors == {}
    assert run(built) == 0 and names(ran) == ["model"]


def test_what_is_left_comes_before_what_broke_off(built, steps):
    plan, ran = steps
    plan["model"] = {"plan": ["a", "b"], "done": [], "errors": {"a": "no end within 90 s"}, "ending": None}
    assert run(built) == 1 and record_of(built)["stages"]["model"]["state"] == "partial"
    ran.clear()
    assert run(built) == 1 and list(ran[0][2].errors) == ["a"]


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError("Input/output error")


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_terminal_that_hangs_up_leaves_the_record(built, steps, monkeypatch, ignored):
    plan, ran = steps
    plan["bench-norm"]["signal"] = signal.SIGHUP
    monkeypatch.setattr(sys, "stdout", io.StringIO() if ignored else Gone())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *given: pytest.fail("not handled"))
    try:
        assert run(built) == (0 if ignored else 1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert names(ran)[-1] == ("model" if ignored else "bench-norm")
    assert record_of(built)["stages"]["test"]["state"] == "done"


def test_a_stage_whose_tool_is_missing_is_skipped_and_passes(built, steps, capsys):
    plan, ran = steps
    plan["sanitize"]["skip"] = "compute-sanitizer is neither on PATH nor beside nvcc"
    assert run(built) == 0
    assert "sanitize       skipped (compute-sanitizer is neither" in capsys.readouterr().out
    stage = record_of(built)["stages"]["sanitize"]
    assert stage["state"] == "skipped" and text.line(stage) == f"skipped ({stage['why']}), 0 s"
    ran.clear()
    assert run(built) == 0 and names(ran) == ["sanitize"]  # it may have been installed


def test_nothing_runs_on_a_build_that_failed(built, steps):
    plan, ran = steps
    plan["build"] = {"plan": ["install"], "done": [], "ending": "the process ended with status 1"}
    shutil.rmtree(built / "work" / "site")
    assert run(built, "--stages", "model") == 1
    assert names(ran) == ["build"] and record_of(built)["stages"]["build"]["state"] == "failed"


def test_the_budget_is_shared_and_not_overdrawn(built, steps):
    _, ran = steps
    assert run(built, "--stages", "bench-norm bench-adam model", "--budget", "135") == 0
    seconds = {name: seconds for name, seconds, _ in ran}
    assert seconds["bench-norm"] == pytest.approx(120 * 20 / 40, abs=1)
    assert seconds["model"] == pytest.approx(120, abs=1)  # the others left their time
    ran.clear()
    assert run(built, "--stages", "test", "--budget", "16") == 1 and ran == []


def test_an_unreadable_sanitizer_log_is_no_clean_bill(tmp_path):
    (tmp_path / "memcheck-1.log").write_text("========= COMPUTE-SANITIZER\n========= Invalid __global__ write\n")
    (tmp_path / "racecheck-1.log").write_text(
        "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)\n"
    )
    found = stages.sanitizer_findings(tmp_path)
    assert found["memcheck"] == {"errors": None, "words": ["Invalid __global__ write"]}
    assert found["racecheck"]["errors"] == 2 and "initcheck" not in found
    stage = {"state": "done", "errors": {}, "done": {}, "tools": {"memcheck": found["memcheck"]}}
    assert not text.passed(stage)


@pytest.mark.parametrize("words", ["Error: Device not supported.", "Error: Target application terminated"])
def test_only_a_device_that_is_not_supported_skips_the_sanitizer(built, monkeypatch, words):
    """Any other end before the first item is a failure of ours to look into."""
    script = f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --log-file ]] && log=${{2//%p/$$}}; shift 2; done
echo "========= {words}" > "$log"
echo what the process said
exit 1
"""
    tool(built / "bin", "compute-sanitizer", script)
    monkeypatch.setenv("PATH", str(built / "bin"), prepend=os.pathsep)
    assert run(built, "--stages", "sanitize") == ("Target" in words)
    stage = record_of(built)["stages"]["sanitize"]
    assert stage["state"] == ("failed" if "Target" in words else "skipped")
    assert "what the process said" in stage["log"]
    if "Target" not in words:
        assert stage["why"] == f"compute-sanitizer cannot watch this device: {words}"


def test_a_chart_that_cannot_be_drawn_costs_no_table(built, monkeypatch, capsys):
    from gpu import render

    def fail(*_):
        raise IndexError("no device")

    monkeypatch.setattr(render.plot, "draw", fail)
    assert run(built, "--stages", "bench-norm") == 0
    (path,) = (built / "results" / "cpu").glob("*.json")
    capsys.readouterr()
    render.main(path)
    assert "no chart of norm: IndexError: no device" in capsys.readouterr().err
    assert "rms_norm forward kernel float32 6x64" in path.with_suffix(".md").read_text()


def test_what_a_sanitizer_found_before_it_was_cut_off_stays():
    def found(errors, *words, **more):
        return {"errors": errors, "words": list(words), **more}

    assert stages._together(None, found(1, "a")) == found(1, "a")
    assert stages._together(found(1, "a"), found(2, "b")) == found(3, "a", "b")
    assert stages._together(found(None, "a"), found(0)) == found(None, "a")
    assert stages._together(found(None), found(0)) == found(0)
    assert stages._together(found(2, "a"), found(None)) == found(None, "a")


def test_a_record_begins_again_after_its_machine_is_gone(tmp_path):
    first = Record(tmp_path, "c0", False, {"device": "x"})
    first.update("model", Progress(["a"], {"a": {"value": 1}}, {}), state="done", seconds=1.0)
    second = Record(tmp_path, "c0", False, {"device": "x"})
    assert second.path == first.path and second.progress("model").done == {"a": {"value": 1}}
    assert Record(tmp_path, "c1", False, {"device": "x"}).path != first.path
