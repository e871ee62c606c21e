"""A plan that is written, read back, and planned again the next day."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small import plan, problem

from bigmodel import schedule
from bigmodel.cli import main
from bigmodel.schedule import Job, Plan, Pool, Problem, Rate

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_is_read_back_equal():
    lost = plan(deadline=7).replan(3, {"progress": {"long": 0.0}}, gap=1e-6)
    points = tuple(Rate(pool=pool, devices=1, rate=1 / 3600) for pool in ("cheap", "dear"))
    mixed = Job(name="mixed", work=3.0, throughput=points, mix_pools=True)
    jobs = (mixed, Job(name="poor", work=1.0, throughput=points, value=0.1, replicas=2))
    other = schedule.solve(Problem(slots=4, pools=problem().pools, jobs=jobs), gap=1e-6)
    for old in (plan(), lost, other):
        new = Plan.from_json(old.to_json())
        assert new == old and (new.allocation == old.allocation).all()
        assert new.table() == old.table() and new.prices() == old.prices() and new.gap == old.gap
        assert Plan.from_json(json.dumps(json.loads(old.to_json()))) == old  # however it is laid out
    assert plan() != lost
    read = Plan.from_json(lost.to_json())
    assert read.replan(5, {"deadlines": {"long": 11}}, gap=1e-6).softened == ()


def test_a_plan_of_csv_prices_needs_the_file_no_more(tmp_path):
    (tmp_path / "p.csv").write_text("p,g\n" + "".join(f"{1 + hour / 8},{hour}\n" for hour in range(12)))
    price, carbon = ({"csv": "p.csv", "column": column} for column in "pg")
    pool = Pool(name="g", count=2, price=price, carbon=carbon, kw=1.0)
    job = Job(name="a", work=4.0, throughput=(Rate(pool="g", devices=1, rate=1 / 3600),))
    old = schedule.solve(Problem(slots=12, pools=(pool,), jobs=(job,), folder=str(tmp_path)), gap=1e-6)
    written = old.to_json()
    (tmp_path / "p.csv").unlink()
    new = Plan.from_json(written)
    assert (new.problem.price == old.problem.price).all() and (new.problem.carbon == old.problem.carbon).all()
    assert new.cost == old.cost and new.replan(1, gap=1e-6).cost == pytest.approx(old.cost - 1.0)


def changed(text, key, value):
    return json.dumps(json.loads(text) | {key: value})


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda text: text[: len(text) // 2], "plan: is no JSON"),
        (lambda text: "[" * 100_000, "plan: is no JSON"),
        (lambda text: "[1]", "plan: has no sha256"),
        (lambda text: changed(text, "cost", 0.0), "plan: was changed"),
        (lambda text: changed(text, "stages", []), "plan: was changed"),
        (lambda text: text.replace('"devices": 1', '"devices": 2', 1), "plan: was changed"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(spoil, words):
    with pytest.raises(ValueError) as error:
        Plan.from_json(spoil(plan().to_json()))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_plan_that_breaks_a_rule_is_not_read():
    old = plan()
    broken = replace(old, allocation=2 * old.allocation)
    with pytest.raises(ValueError, match="^plan: breaks a rule: long: may not run on 2 devices of cheap"):
        Plan.from_json(broken.to_json())


def test_the_documented_commands_run(tmp_path, monkeypatch, capsys):
    """The example of docs/planner.md, with less time for each plan."""
    text = (ROOT / "docs/planner.md").read_text().split("## Planning again")[1].split("\n## ")[0]
    changes = re.search(r"```toml\n(.*?)```", text, re.S)[1]
    lines = re.search(r"```sh\n(.*?)```", text, re.S)[1].splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "changes.toml").write_text(changes)
    for line in lines:
        arguments, _, into = line.partition("#")[0].partition(">")
        limit = [] if "--example" in line else ["--time-limit", "3", "--gap", "0.2"]
        assert main([*arguments.split()[1:], *limit]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        if into:
            (tmp_path / into.strip()).write_text(shown)
    assert shown.splitlines()[-1].startswith("cost from slot 32 on ")
    monday, tuesday = (Plan.from_json((tmp_path / f"{day}.json").read_text()) for day in ("monday", "tuesday"))
    assert tuesday.problem.now == 32 and monday.diff(tuesday) in shown
    (python,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(python, {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("cost from slot 32 on ")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["problem.json", "--replan", "1"], 1, "problem.json: plan: has no sha256"),
        (["plan.json", "--replan", "soon"], 1, "replan: now: 'soon' is neither"),
        (["plan.json", "--replan", "1", "--changes", "changes.toml"], 1, "replan: changes: is 'speed'"),
        (["plan.json", "--replan", "1", "--changes", "changes.txt"], 1, "changes.txt: a file of changes is a .toml"),
        (["plan.json", "--replan", "1", "--check"], 2, "--check takes no --replan"),
        (["problem.json", "--changes", "changes.toml"], 2, "a plan without --replan takes no --changes"),
    ],
)
def test_what_cannot_be_planned_again_is_one_sentence(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    schedule.dump(problem(), "problem.json")
    Path("plan.json").write_text(plan().to_json())
    Path("changes.toml").write_text("speed = 1")
    assert main(["plan", *arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"bigmodel plan: {words}") and len(said.splitlines()) == 1


def test_csv_columns_of_changes_start_at_their_file(tmp_path):
    from bigmodel.schedule import changes

    (tmp_path / "p.csv").write_text("p\n" + "5.0\n" * 12)
    (tmp_path / "c.toml").write_text(
        'deadlines.long = 2000-01-01T11:00:00\nprices.cheap = { csv = "p.csv", column = "p" }'
    )
    new = plan().replan(1, changes.load(tmp_path / "c.toml"), gap=1e-6)
    assert (new.problem.price[0] == 5.0).all() and new.problem.jobs[0].deadline == "2000-01-01T11:00:00"
