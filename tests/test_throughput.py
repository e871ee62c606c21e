"""`bigmodel bench --throughput` writes what a planner's job reads."""

import json

import pytest

from bigmodel import cli
from bigmodel.schedule import Rate, files


def test_points_are_read_back(tmp_path, capsys):
    assert cli.main(["bench", "--throughput", "--quick", "--device", "cpu", "--json", str(tmp_path / "t.json")]) == 0
    read = files.toml().loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "t.json").read_text())["throughput"] == read["throughput"]
    (point,) = [Rate(**point) for point in read["throughput"]]
    assert (point.pool, point.devices, point.source) == ("cpu", 1, "measured") and point.rate > 0


@pytest.mark.parametrize("arguments", [["norm", "--throughput"], ["plan", "--device", "cpu"]])
def test_arguments_that_do_not_belong_together(arguments, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
