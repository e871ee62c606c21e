"""`make gpu` and its machine: what it looks for, how its processes start, and what it says where it cannot start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_tools import ROOT, tool
from gpu import build, command, exercise, machine, stages, text

from bigmodel.benchmarks.journal import Progress, read


@pytest.fixture(scope="module")
def here():
    return machine.look("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("sees", [True, False], ids=["a GPU that torch cannot use", "no GPU"])
def test_a_machine_without_a_gpu_gets_one_line(tmp_path, sees):
    shown = "echo 'Note, the driver is new'; echo 'NVIDIA H100, 580.65.06'" if sees else "exit 9"
    tool(tmp_path / "bin", "nvidia-smi", f"#!/bin/sh\n{shown}")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run([sys.executable, str(ROOT / "bench" / "gpu")], env=env, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("make gpu: no GPU that can be used: nvidia-smi shows " + ("NVIDIA H100" if sees else "none"))


def test_what_a_build_needs_is_named_before_it_begins(monkeypatch, capsys):
    monkeypatch.setitem(machine.BUILD, "no_such_builder", "no-such-builder")
    assert command.main(["--device", "cpu"]) == 2
    assert "lacks no-such-builder; nothing is downloaded here" in capsys.readouterr().err
    assert command.main(["--device", "cpu", "--stages", "tset"]) == 2
    assert "no stage tset; there are build, test" in capsys.readouterr().err


def test_the_build_is_offline_and_for_the_device_found(monkeypatch, tmp_path):
    seen = {}

    def pip(command, env, **options):
        seen.update(env, command=command)
        return subprocess.CompletedProcess(command, 1, "building\nnorm.cu(3): error: expected a ;\n")

    monkeypatch.setattr(build.subprocess, "run", pip)
    monkeypatch.setattr(build, "nvcc", lambda: "/opt/cuda/bin/nvcc")
    with pytest.raises(RuntimeError, match=r"could not build it: norm.cu\(3\): error: expected a ;"):
        build.install("cuda", "90", tmp_path / "site")
    assert int(seen["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1  # of make, where there is no ninja
    assert seen["CUDAARCHS"] == "90-real" and seen["CUDACXX"] == "/opt/cuda/bin/nvcc"
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(seen["command"])
    assert "--config-settings=cmake.define.BIGMODEL_CUDA=ON" in seen["command"]


def supervised(monkeypatch, tmp_path, stage, here):
    """The commands and environments that a stage starts."""
    seen = []
    monkeypatch.setattr(stages, "supervise", lambda command, path, **options: seen.append((command, options["env"])))
    work = stages.Work(stages.Context(here, tmp_path, []), "stage", Progress(), lambda: None)
    stage(work, 60)
    return seen


def test_what_a_run_caches_lies_beside_the_build(monkeypatch, tmp_path, here):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/users/own")
    env = stages.Context(here, tmp_path, []).environment()
    assert Path(env["TRITON_CACHE_DIR"]).is_relative_to(tmp_path) and env["TORCHINDUCTOR_CACHE_DIR"] == "/users/own"


def test_the_build_sees_what_the_user_has_on_the_path(monkeypatch, tmp_path, here):
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    ((_, env),) = supervised(monkeypatch, tmp_path, stages.build, here)
    assert env["PYTHONPATH"].split(os.pathsep) == [str(ROOT / "bench"), str(ROOT / "python"), "/users/own"]


def test_initcheck_sees_the_kernels_that_write_the_inputs(monkeypatch, tmp_path, here):
    monkeypatch.setattr(machine, "sanitizer", lambda: "compute-sanitizer")
    seen = supervised(monkeypatch, tmp_path, stages.sanitize, here)
    filtered = {command[2]: "--kernel-name" in command for command, _ in seen}
    assert filtered == {"memcheck": True, "racecheck": True, "initcheck": False}


REFUSING = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --log-file ]] && log=${2//%p/$$}; [[ $1 == --tool ]] && tool=$2; shift 2; done
[[ $tool =~ $REFUSED ]] || exec "$@"
echo $tool >> "${log%/*}/started"
printf '========= COMPUTE-SANITIZER\\n========= Error: Device not supported\\n' > "$log"
exit 1
"""


@pytest.mark.parametrize("refused", ["memcheck", "memcheck|racecheck|initcheck"], ids=["one", "all"])
def test_a_tool_that_refuses_the_device_is_started_once_and_skipped(monkeypatch, tmp_path, here, refused):
    tool(tmp_path / "bin", "compute-sanitizer", REFUSING)
    monkeypatch.setenv("REFUSED", refused)
    monkeypatch.setattr(machine, "sanitizer", lambda: str(tmp_path / "bin" / "compute-sanitizer"))
    work = stages.Work(stages.Context(here, tmp_path, []), "sanitize", Progress(), lambda: None)
    if refused == "memcheck":
        assert stages.sanitize(work, 60) is None
        assert work.tools["memcheck"] == {"errors": 0, "words": [], "skipped": "Error: Device not supported"}
        stage = {"state": "done", "seconds": 1, "left": [], "tools": work.tools, **vars(work.progress())}
        assert "memcheck: skipped (Error: Device not supported)" in text.line(stage) and text.passed(stage)
        assert {item.split(":")[0] for item in work.progress().done} == {"racecheck", "initcheck"}
    else:
        with pytest.raises(stages.Skipped, match="cannot watch this device: Error: Device not supported"):
            stages.sanitize(work, 60)
    assert sorted((tmp_path / "started").read_text().split()) == sorted(refused.split("|"))


def test_what_a_sanitizer_found_is_kept_where_the_run_is_stopped(monkeypatch, tmp_path, here):
    def stopped(work, command, seconds, env, tool, stall):
        (tmp_path / f"{tool}-1.log").write_text(f"========= {tool} found it\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(stages.Work, "supervise", stopped)
    before = {"memcheck": {"errors": 1, "words": ["earlier"]}}
    work = stages.Work(stages.Context(here, tmp_path, []), "sanitize", Progress(), lambda: None, before)
    with pytest.raises(KeyboardInterrupt):
        stages.sanitize(work, 60)
    assert work.tools["memcheck"] == {"errors": None, "words": ["earlier", "memcheck found it"]}
    assert work.tools["racecheck"] == {"errors": None, "words": ["racecheck found it"]}


def test_an_exercise_plans_nothing_where_the_device_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: (_ for _ in ()).throw(RuntimeError("CUDA error: 999")))
    words = ["--tool", "memcheck", "--device", "cpu", "--until", "inf", "--journal", str(tmp_path / "j")]
    monkeypatch.setattr(sys, "argv", ["exercise", *words])
    with pytest.raises(RuntimeError, match="999"):
        exercise.main()
    assert read(tmp_path / "j").plan == []


def test_every_file_with_tests_of_a_gpu_is_known():
    """A collection of all files finds none that the test stage leaves out."""
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "cuda", str(ROOT / "tests")]
    command = [sys.executable, "-m", "pytest", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    holding = {str(ROOT / line.split("::")[0]) for line in result.stdout.splitlines() if "::" in line}
    *known, _, mark = stages.cuda_tests()
    assert mark == "cuda" and len(holding) > 10 and holding <= set(known)
    assert len(known) < 2 * len(holding)
    own = [Path(path).name.startswith("test_cuda") for path in known]
    assert own == sorted(own, reverse=True) and own[0]  # what only a device can answer comes first


def test_the_sanitizer_is_found_in_the_toolkit(monkeypatch, tmp_path):
    tool(tmp_path / "compute-sanitizer", "compute-sanitizer", "")
    tool(tmp_path / "bin", "nvcc", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "bin" / "nvcc"))
    assert Path(machine.sanitizer()).samefile(tmp_path / "compute-sanitizer" / "compute-sanitizer")


NVCC = [{}, {"CUDACXX": "a"}, {"CUDA_HOME": "home"}, {"CUDA_PATH": "path"}, {"CUDA_HOME": "none", "CUDA_PATH": "path"}]


@pytest.mark.skipif(not shutil.which("cmake"), reason="has no cmake")
@pytest.mark.parametrize("given", NVCC, ids=lambda given: "+".join(given) or "PATH")
def test_the_build_and_the_machine_look_for_nvcc_in_the_same_places(monkeypatch, tmp_path, given):
    for folder in ("home", "path", "any"):
        (tmp_path / folder).mkdir()
        tool(tmp_path / folder / "bin", "nvcc", "")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in given.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    cmake = shutil.which("cmake")
    monkeypatch.setenv("PATH", str(tmp_path / "any" / "bin"))
    script = tmp_path / "look.cmake"
    script.write_text(f"include({ROOT / 'cmake' / 'nvcc.cmake'})\nmessage(${{BIGMODEL_NVCC}})\n")
    result = subprocess.run(
        [cmake, f"-DPython_EXECUTABLE={sys.executable}", "-P", str(script)], capture_output=True, text=True
    )
    expected = {"CUDACXX": "a", "CUDA_HOME": "home/bin/nvcc", "CUDA_PATH": "path/bin/nvcc"}
    chosen = next((expected[name] for name, folder in given.items() if folder != "none"), "any/bin/nvcc")
    assert result.stderr.strip() == machine.nvcc() == str(tmp_path / chosen)


@pytest.mark.parametrize("has", ["ninja", "make", ""])
def test_make_does_where_ninja_is_missing(monkeypatch, tmp_path, has):
    found = {"torch": "2.11", "cuda": None, "devices": []}
    modules = dict.fromkeys([*machine.BUILD, "cmake", *machine.WANTED, *machine.PEERS], True) | {"ninja": False}
    answer = subprocess.CompletedProcess([], 0, json.dumps(found | {"modules": modules}))
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **options: answer)
    monkeypatch.setattr(machine.shutil, "which", lambda name, path=None: name == has or None)
    if has:
        assert machine.look("cpu").device == "cpu"
    else:
        with pytest.raises(machine.Unusable, match="lacks ninja or make; nothing is downloaded here"):
            machine.look("cpu")


def test_a_checkout_without_git_is_known_by_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    (tmp_path / "CMakeLists.txt").write_text("1")
    first = machine.tree()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    second = machine.tree()
    (tmp_path / "CMakeLists.txt").write_text("2")
    assert first[0].startswith("sources-") and not first[1] and len({first, second, machine.tree()}) == 3
