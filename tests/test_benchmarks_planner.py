"""Long measurements of the planner: kept as they come, and gone on with."""

import json

import pytest

from bigmodel import cli
from bigmodel.benchmarks import planner
from bigmodel.benchmarks.records import Records


def test_records_of_this_commit_are_not_measured_again(tmp_path):
    path, made = tmp_path / "plan.json", []

    def make():
        made.append(len(made))
        return {"gap": made[-1]}

    for commit in ("a", "a", "b"):
        for seed in (0, 1):
            record = Records(path, commit).measure("gaps", {"seed": seed}, make)
            assert record["commit"] == commit and record["seed"] == seed and "shared" in record
    assert made == [0, 1, 2, 3]
    assert [record["gap"] for record in json.loads(path.read_text())["gaps"]] == made
    assert Records(path, "a").of("gaps") == json.loads(path.read_text())["gaps"][:2]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    path, measured = tmp_path / "plan.json", []

    def measure(size, family, load, seed):
        measured.append((family, load, seed))
        return {"gap": 0.001, "cost": 1.0, "bound": 0.999, "seconds": 1.0, "memory_mib": 100}

    monkeypatch.setattr(planner, "measure", measure)
    monkeypatch.setattr(planner, "import_seconds", lambda: 0.1)
    assert "stopped" in planner.run(path=path, sizes=["20x3x48"], stop_after=0) and measured == []
    assert "| B | 20x3x48 | all | 0.10% |" in planner.run(path=path, sizes=["20x3x48"])
    assert len(measured) == len(set(measured)) == 90 and measured[8] == ("C", 0.85, 0)
    planner.run(path=path, sizes=["20x3x48"])
    assert len(measured) == 90


@pytest.mark.parametrize("words", [["norm", "--size", "20x3x48"], ["plan", "--size", "9"]])
def test_options_of_the_planner_alone(words, capsys):
    assert cli.main(["bench", *words]) == 2
    assert "--size" in capsys.readouterr().err
