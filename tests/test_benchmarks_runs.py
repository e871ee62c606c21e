"""Runs of the benchmark: processes, what fails, what the time does not reach, and the command line."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_cases import SMALL, make_report, measurement

from bigmodel import cli
from bigmodel.benchmarks import adam, norm, run, softmax
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES
from bigmodel.benchmarks.harness import FLOATS, FURTHER, Measurement
from bigmodel.benchmarks.journal import Journal, read

# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages, expected", [(DEFAULT_PAGES, None), (HUGE_PAGES, "1")])
def test_each_way_of_allocating_has_its_own_environment(monkeypatch, pages, expected):
    seen = {}

    def start(command, env):
        seen.update(env)
        Journal(Path(command[command.index("--journal") + 1])).end("norm: case", row=measurement().to_dict())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(run.subprocess, "run", start)
    progress = run.measure_in_process(["norm"], "cpu", pages, quick=True, sweep=False)
    assert Measurement.from_dict(progress.done["norm: case"]["row"]) == measurement()
    assert seen.get("THP_MEM_ALLOC_ENABLE") == expected


def test_a_failed_measuring_process_is_an_error():
    with pytest.raises(RuntimeError, match="measuring nonsense with default pages ended with exit status 1"):
        run.measure_in_process(["nonsense"], "cpu", DEFAULT_PAGES, quick=True, sweep=False)


def in_this_process(tmp_path):
    """Stands for measure_in_process."""

    def measure(groups, device, pages, **options):
        journal = Journal(tmp_path / f"journal {pages}")
        run.measure_groups(groups, device, journal, **options)
        return read(journal.path)

    return measure


def test_a_run_measures_judges_and_reports(monkeypatch, tmp_path):
    tiny = [norm._case("cpu", "layer_norm", norm.FORWARD_KERNEL, torch.float32, SMALL)]
    monkeypatch.setattr(norm, "cases", lambda device, quick, sweep: tiny)
    monkeypatch.setattr(run, "measure_in_process", in_this_process(tmp_path))
    found = run.run("norm", device="cpu", quick=True)
    assert list(found.measurements) == [DEFAULT_PAGES, HUGE_PAGES]
    assert [row.case for row in found.measurements[HUGE_PAGES]] == [tiny[0].name]
    assert found.verdicts == [] and found.failed == {} and found.left == []


def test_a_failing_case_is_told_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    good = norm._case("cpu", "layer_norm", norm.FORWARD_KERNEL, torch.float32, SMALL)

    def fail(device):
        raise RuntimeError("launch failed\nat line 3")

    bad = dataclasses.replace(good, op="broken", build=fail)
    monkeypatch.setattr(norm, "cases", lambda device, quick, sweep: [bad, good])
    monkeypatch.setattr(run, "measure_in_process", in_this_process(tmp_path))
    assert cli.main(["bench", "norm", "--quick", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert f"**failed**: {bad.name}, {DEFAULT_PAGES}: RuntimeError: launch failed\n" in text
    assert f"| {good.name} " in text


def test_what_the_time_does_not_reach_is_named(monkeypatch, tmp_path):
    cases = [norm._case("cpu", "layer_norm", norm.FORWARD_KERNEL, torch.float32, (6, cols)) for cols in (8, 16, 24)]
    monkeypatch.setattr(norm, "cases", lambda device, quick, sweep: cases)
    monkeypatch.setattr(run, "measure_in_process", in_this_process(tmp_path))
    now = iter([0.0, 1.0, 99.0] * 2)  # the limit is set, the first case is in time, the second is not
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    found = run.run_groups(["norm"], device="cpu", quick=True, seconds=20)[0]
    assert [row.case for row in found.measurements[DEFAULT_PAGES]] == [cases[0].name]
    assert found.left[:2] == [f"{cases[1].name}, {DEFAULT_PAGES}", f"{cases[2].name}, {DEFAULT_PAGES}"]
    assert f"Not measured, for want of time: {cases[1].name}" in found.to_markdown()


def test_telling_cases_come_first():
    cases = {f"norm: {case.name}": case for case in norm.cases("cuda", sweep=True)}
    order = run.telling_first(cases)
    assert sorted(order) == sorted(cases)
    # Two points for each line: so many of a run of 480 s on a GPU fit.
    points, lines = ([cases[item] for item in order[:30] if cases[item].sweep is swept] for swept in (True, False))
    assert (len(points), len(lines)) == (20, 10)
    assert {(c.op, c.mode, c.dtype) for c in points[:8]} == {
        (op, mode, dtype)
        for op in ("rms_norm", "layer_norm")
        for mode in (norm.FORWARD, norm.BACKWARD)
        for dtype in FLOATS
    }
    assert [c.shape[1] for c in points] == [4096] * 8 + [1024] * 8 + [4096] * 4
    assert [c.dtype for c in points[16:]] == [torch.float16, torch.float16, torch.float64, torch.float64]
    assert {c.shape for c in lines} == {norm.LARGE} and [c.mode for c in lines[:6]] == [norm.BOTH] * 6
    assert list(run.halving(7)) == [3, 1, 5, 0, 2, 4, 6]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_dtype_is_measured_at_some_row_length(device):
    for group in (norm, softmax):
        swept = [case for case in group.cases(device, sweep=True) if case.sweep]
        lengths = {dtype: {c.shape[1] for c in swept if c.dtype is dtype} for dtype in (*FLOATS, *FURTHER)}
        assert all(lengths[dtype] == set(group.SWEEP_LENGTHS) for dtype in FLOATS)
        assert all(lengths[dtype] == {4096} for dtype in FURTHER)
        assert all(goal.case.split()[-2] in ("float32", "bfloat16") for goal in group.goals(device))
    assert {case.dtype for case in adam.cases("cuda")} == {*FLOATS, torch.float16}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_without_tqdm_on_a_terminal_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for stream, shown in ((Terminal(), "\rnorm: 0/2 cases\rnorm: 1/2 cases\n"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(run._progress(["a", "b"], "norm")) == ["a", "b"]
        assert stream.getvalue() == shown


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="group is 'abnorm', known are norm"):
        run.run("abnorm")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        run.run("norm", device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        run.run("norm", device="cuda")


def test_commit_is_only_that_of_a_bigmodel_checkout(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.commit() is None
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bind.cpp").touch()
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert run.commit() == head[:12]


# --- the command line ------------------------------------------------------------------------------------------------


def test_bench_refuses_a_folder_that_is_not_there_before_it_measures(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "run_groups", lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(["bench", "norm", "--json", str(tmp_path / "absent" / "out.json")]) == 2
    assert "absent" in capsys.readouterr().err


def test_bench_prints_the_table_and_writes_json_and_chart(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    asked = {}

    def fake_run(groups, **options):
        asked.update(options, groups=groups)
        return [make_report({DEFAULT_PAGES: [measurement(), measurement("point", sweep=True)]})]

    monkeypatch.setattr(run, "run_groups", fake_run)
    out, chart = tmp_path / "out.json", tmp_path / "chart.png"
    assert cli.main(["bench", "norm", "--quick", "--json", str(out), "--plot", str(chart)]) == 0
    assert asked == {"groups": ["norm"], "device": None, "quick": True, "sweep": True, "seconds": None}
    assert json.loads(out.read_text())["group"] == "norm"
    assert chart.stat().st_size > 1000
    assert "| op forward float32 8x16 |" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "abnorm"])
    assert stop.value.code == 2
    assert "abnorm" in capsys.readouterr().err
