"""Work that goes on after its process crashed, hung, or was cut off."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigmodel.benchmarks import journal
from bigmodel.benchmarks.journal import Journal, read, supervise

HOME = str(Path(journal.__file__).parent)

# Items do what their name says. "crash" and "hang" would do it every time: the item has an error after the first.
WORKER = f"""
import os, subprocess, sys, time
sys.path.insert(0, {HOME!r})
from pathlib import Path
from journal import Journal

journal = Journal(Path(sys.argv[1]))
for item in journal.plan(sys.argv[2:]):
    journal.begin(item)
    if item == "crash":
        os.kill(os.getpid(), 11)
    elif item == "hang":
        time.sleep(60)
    elif item == "start":
        child = subprocess.Popen(["sleep", "600"])
        print(os.getpid(), child.pid)
        time.sleep(600)
    elif item == "leave":
        sys.exit(7)
    elif item == "torn":
        with journal.path.open("a") as file:
            file.write('{{"end": "torn", "valu')
        os.kill(os.getpid(), 9)
    journal.end(item, pid=os.getpid())
"""


def run(path, *items, seconds=60.0, stall=20.0):
    return supervise([sys.executable, "-S", "-c", WORKER, str(path), *items], path, seconds=seconds, stall=stall)


def test_every_item_ends_once(tmp_path):
    path = tmp_path / "j"
    assert run(path, "a", "b") is None
    assert list(read(path).done) == ["a", "b"] and read(path).left == []
    before = path.read_text()
    assert run(path, "a", "b") is None
    assert path.read_text().count('"end"') == before.count('"end"')


@pytest.mark.parametrize(
    "item, why",
    [
        ("crash", "the process died of SIGSEGV"),
        ("leave", "the process ended with status 7"),
        ("torn", "the process died of SIGKILL"),
    ],
)
def test_a_crash_costs_its_item_alone(tmp_path, item, why):
    path = tmp_path / "j"
    assert run(path, "a", item, "b") is None
    progress = read(path)
    assert progress.errors == {item: why} and list(progress.done) == ["a", "b"]
    assert progress.done["a"]["pid"] != progress.done["b"]["pid"]


def test_a_hang_is_stopped(tmp_path):
    path = tmp_path / "j"
    assert run(path, "a", "hang", "b", stall=1.0) is None
    assert read(path).errors == {"hang": "no end within 1 s, stopped"} and list(read(path).done) == ["a", "b"]


def test_what_the_time_cuts_off_is_left_for_another_time(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "GRACE_SECONDS", 0.0)
    path = tmp_path / "j"
    assert run(path, "a", "hang", "b", seconds=1.5) is None
    progress = read(path)
    assert list(progress.done) == ["a"] and progress.errors == {} and progress.left == ["hang", "b"]


def test_a_process_that_gets_nowhere_is_not_started_for_ever(tmp_path):
    path = tmp_path / "j"
    command = [sys.executable, "-S", "-c", "import sys; sys.exit(4)"]
    assert supervise(command, path, seconds=30, stall=10) == "the process ended with status 4"


def test_stopping_leaves_no_process(tmp_path, monkeypatch):
    started = []
    popen = journal.subprocess.Popen
    monkeypatch.setattr(
        journal.subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[0]
    )

    def tick():
        if path.exists() and read(path).running == "hang":
            raise KeyboardInterrupt

    path = tmp_path / "j"
    command = [sys.executable, "-S", "-c", WORKER, str(path), "hang"]
    with pytest.raises(KeyboardInterrupt):
        supervise(command, path, seconds=30, stall=20, tick=tick)
    assert started[0].returncode == -9


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "under a tool"])
def test_workers_end_with_a_supervisor_that_is_killed(tmp_path, wrapped):
    path, log = tmp_path / "j", tmp_path / "log"
    worker = [sys.executable, "-S", "-c", WORKER, str(path), "start"]
    command = [sys.executable, "-S", "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *worker]
    code = (
        "import sys; from pathlib import Path; from journal import supervise\n"
        "supervise(sys.argv[2:], Path(sys.argv[1]), seconds=600, stall=600)\n"
    )
    with log.open("w") as file:
        arguments = [str(path), *(command if wrapped else worker)]
        env = {"PYTHONPATH": HOME, "PYTHONUNBUFFERED": "1"}
        supervisor = subprocess.Popen([sys.executable, "-S", "-c", code, *arguments], stdout=file, env=env)
    while not (words := log.read_text()).endswith("\n"):
        assert supervisor.poll() is None
        time.sleep(0.05)
    pids = [int(word) for word in words.split()]
    assert all(map(journal._lives, pids))
    supervisor.send_signal(signal.SIGKILL)  # not waited for: a zombie is gone, too
    until = time.monotonic() + 60
    while any(map(journal._lives, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(journal._lives, pids))
    supervisor.wait()


def test_a_journal_goes_on_where_it_was(tmp_path):
    first = Journal(tmp_path / "j")
    assert first.plan(["a", "b", "c"]) == ["a", "b", "c"]
    first.end("a", value=1)
    first.error("b", "no")
    assert Journal(tmp_path / "j").plan(["a", "b", "c"]) == ["c"]
