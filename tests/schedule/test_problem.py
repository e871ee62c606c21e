"""Reading, writing and refusing problems; time zones; per-slot values."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate, Running, files, rates
from bigmodel.schedule.clock import Clock

ROOT = Path(__file__).resolve().parents[2]
RATE = Rate(pool="p", devices=2, rate=10.0)
# Lists in lists that the JSON reader takes and what reads its values does not: two frames a list before Python 3.12.
FRAMES = 900 if sys.version_info < (3, 12) else 1500


def problem(pool=None, job=None, jobs=None, **more):
    pool = Pool(**{"name": "p", "count": 4} | (pool or {}))
    jobs = [{}] if jobs is None else jobs
    made = [
        Job(**{"name": f"j{i}", "work": 10.0, "throughput": (RATE,)} | (job or {}) | extra)
        for i, extra in enumerate(jobs)
    ]
    return Problem(**{"slots": 24, "pools": (pool,), "jobs": tuple(made)} | more)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"slots": 0}, "slots: is 0"),
        ({"slot_hours": float("nan")}, "slot_hours: is nan"),
        ({"tz": "Mars/Olympus"}, "tz: 'Mars/Olympus' is no known"),
        ({"start": "yesterday"}, "start: 'yesterday' is no ISO time"),
        ({"pool": {"price": -1.0}}, "pools[0].price: is -1.0"),
        ({"pool": {"price": [1.0] * 23}}, "pools[0].price: a list of numbers is a 24-hour profile, got 23"),
        ({"pool": {"price": [{"from": 3, "value": 1.0}]}}, "pools[0].price: no range gives a value for slot 0"),
        ({"pool": {"price": {"csv": "none.csv", "column": "x"}}}, "pools[0].price.csv: cannot read none.csv"),
        ({"pool": {"count": 2.5}}, "pools[0].count: 2.5 is not a whole number"),
        ({"pool": {"count": {"slots": [1, 2]}}}, "pools[0].count: needs one value for each of the 24 slots, got 2"),
        ({"pool": {"ownership": "mine"}}, "pools[0].ownership: is 'mine'"),
        ({"pool": {"quota_group": "g"}}, "pools[0].quota_group: 'g' is not in quotas"),
        ({"pool": {"pue": 0.5}}, "pools[0].pue: is 0.5"),
        ({"pool": {"name": "a;b"}}, "pools[0].name: is 'a;b'"),
        ({"job": {"name": "$(rm -rf x)"}}, "jobs[0].name: is '$(rm -rf x)'"),
        ({"jobs": [{}, {"name": "j0"}]}, "jobs[1].name: 'j0' is the name of jobs[0] too"),
        ({"job": {"work": float("inf")}}, "jobs[0].work: is inf"),
        ({"job": {"work": "much"}}, "jobs[0].work: must be a number, got 'much'"),
        ({"job": {"throughput": ()}}, "jobs[0].throughput: is empty"),
        ({"job": {"throughput": (Rate(pool="q", devices=1, rate=1.0),)}}, "jobs[0].throughput[0].pool: is 'q'"),
        ({"job": {"throughput": (RATE, RATE)}}, "jobs[0].throughput[1]: 2 devices of 'p' have a rate already"),
        ({"job": {"throughput": (Rate(pool="p", devices=0, rate=1.0),)}}, "jobs[0].throughput[0].devices: is 0"),
        ({"job": {"release": 24}}, "jobs[0].release: is slot 24"),
        ({"job": {"release": 5, "deadline": 5}}, "jobs[0].deadline: slot 5 leaves no slot"),
        ({"job": {"deadline": "soon"}}, "jobs[0].deadline: 'soon' is no ISO time"),
        ({"job": {"soft": True}}, "jobs[0].soft: needs a deadline"),
        ({"job": {"min_run": 0}}, "jobs[0].min_run: is 0"),
        ({"job": {"after": ("nobody",)}}, "jobs[0].after[0]: is 'nobody'"),
        ({"jobs": [{"after": ("j1",)}, {"after": ("j0",)}]}, "jobs[0].after: 'j0' waits for itself through 'j1'"),
        ({"jobs": [{"after": ("j0",)}]}, "jobs[0].after: 'j0' waits for itself."),
        (
            {"jobs": [{"after": ("j1",)}, {"after": ("j2",)}, {"after": ("j1", "j3")}, {}, {"after": ("j2",)}]},
            "jobs[1].after: 'j1' waits for itself through 'j2'.",
        ),
        ({"pool": {"price": [{"from": 0, "to": 10**400, "value": 1}]}}, "pools[0].price[0].to: 1000"),
        ({"job": {"mix_pools": True, "restart": 1.0}}, "jobs[0].mix_pools: a job that mixes pools"),
        ({"job": {"done": 10.0}}, "jobs[0].done: is 10 of 10"),
        ({"job": {"running": Running(pool="p", devices=2, slots=1)}}, "jobs[0].started: must be true"),
        ({"job": {"env": {"a b": "c"}}}, "jobs[0].env: 'a b'"),
        ({"budgets": {"nobody": 3.0}}, "budgets.nobody: no job has this owner"),
        ({"objective": schedule.Objective(order=("speed",))}, "objective.order[0]: is 'speed'"),
        ({"objective": schedule.Objective(weights={"cost": -1.0})}, "objective.weights.cost: is -1.0"),
        ({"now": 24}, "now: is 24"),
        ({"pools": "p"}, "pools: must be a list, got 'p'"),
        ({"jobs": [], "pools": ()}, "pools: is empty"),
        ({"job": {"throughput": (7,)}}, "jobs[0].throughput[0]: must be of type Rate, got 7"),
        ({"job": {"after": "j0"}}, "jobs[0].after: must be a list, got 'j0'"),
        ({"job": {"preemptible": "no"}}, "jobs[0].preemptible: must be true or false, got 'no'"),
        ({"job": {"owner": 3}}, "jobs[0].owner: must be text"),
        ({"job": {"image": "a\nb"}}, "jobs[0].image: must be text without control characters"),
        ({"pool": {"partition": "a\nrm -rf ."}}, "pools[0].partition: must be text without control characters"),
        ({"quotas": [3]}, "quotas: must be a table, got [3]"),
        ({"objective": "cost"}, "objective: must be of type Objective, got 'cost'"),
        ({"slots": 10**8}, "slots: is 100000000"),
        ({"slot_hours": 1e-9}, "slot_hours: is 1e-09"),
        ({"slot_hours": 1e5}, "slot_hours: is 100000; a horizon of at most 1e+06 hours"),
        ({"start": "9999-12-31T20:00"}, "start: '9999-12-31T20:00' is no ISO time from which the horizon"),
        ({"pool": {"count": 1e12}}, "pools[0].count: 1e+12 is not a whole number of devices up to 1000000000"),
        ({"pool": {"price": 1e300}}, "pools[0].price: is 1e+300"),
        ({"pool": {"price": [{"value": 1.0}, {"from": float("nan"), "value": 2.0}]}}, "pools[0].price[1].from: nan"),
        ({"pool": {"price": {"csv": 3, "column": "x"}}}, "pools[0].price.csv: must be text, got 3"),
        ({"job": {"replicas": 10**9}}, "jobs[0].replicas: is 1000000000"),
        (
            {"job": {"mix_pools": True, "started": True, "running": Running(pool="p", devices=2, slots=1)}},
            "jobs[0].running: a job that mixes pools",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_path(arguments, words):
    with pytest.raises(ValueError) as error:
        problem(**arguments)
    assert str(error.value).startswith(words), str(error.value)
    assert "\n" not in str(error.value)


def test_toml_and_json_read_back_equal(tmp_path):
    written = schedule.load(ROOT / "examples/plan_week.toml")
    for name in ("a.toml", "a.json"):
        schedule.dump(written, tmp_path / name)
        assert schedule.load(tmp_path / name) == written


def test_what_is_written_elsewhere_needs_no_csv_file(tmp_path):
    """The file has two columns; a slot's price is the average of what holds in it."""
    (tmp_path / "p.csv").write_text("t,x,n\n2000-01-01T00:00,1,4\n2000-01-01T00:30,3,2\n")
    column = {"csv": "p.csv", "time": "t"}
    pool = {"price": column | {"column": "x"}, "carbon": column | {"column": "x"}, "count": column | {"column": "n"}}
    written = problem(pool=pool | {"kw": 1.0}, folder=str(tmp_path), slots=2)
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    for name in ("p.toml", "p.json"):
        schedule.dump(written, elsewhere / name)
        read = schedule.load(elsewhere / name)
        assert read.price.tolist() == [[2.0, 3.0]] and read.count.tolist() == [[2, 2]]
        assert (read.carbon == written.carbon).all()


def test_example_is_the_shipped_one():
    assert schedule.example() == (ROOT / "examples/plan_week.toml").read_text()
    week = schedule.load(ROOT / "examples/plan_week.toml")
    assert (week.slots, len(week.pools), len(week.jobs)) == (168, 4, 10)


@pytest.mark.parametrize(
    "text, words",
    [
        ("slots = [", "a.toml: "),
        ("slots = 3\npools = [{ name = 'p', count = 1 }]", "jobs: is empty"),
        ("slots = 3\npools = 4\njobs = []", "pools: must be a list of tables, got 4"),
        ("slots = 3\npools = [{ name = 'p' }]\njobs = []", "pools[0].count: is missing"),
        ("slots = 3\npools = [{ name = 'p', count = 1, cost = 2 }]\njobs = []", "pools[0].cost: is no field"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, words):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        schedule.load(tmp_path / "a.toml")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"slots": 3, "pools": [], "slots": 4}', "a.json: the key 'slots' comes twice in one object."),
        ('{"slots": ' + "[" * 100_000 + "]" * 100_000 + "}", "a.json: is nested too deeply."),
        ('{"slots": ' + "[" * FRAMES + "]" * FRAMES + "}", "a.json: is nested too deeply."),
    ],
)
def test_bad_json_is_one_sentence(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError) as error:
        schedule.load(tmp_path / "a.json")
    assert str(error.value).endswith(words) and str(tmp_path) in str(error.value)


def test_per_slot_values(tmp_path):
    (tmp_path / "p.csv").write_text("t,x\n2026-01-05T00:00,1\n2026-01-05T12:00,3\n")
    data = {
        "slots": 24,
        "start": "2026-01-05T00:00",
        "pools": [
            {"name": "p", "count": [{"value": 4}, {"from": 3, "to": 5, "value": 1}], "price": list(range(24))},
            {"name": "q", "count": 1, "price": {"csv": "p.csv", "column": "x", "time": "t"}},
            {"name": "r", "count": 1, "price": {"slots": list(range(24))}},
        ],
        "jobs": [{"name": "j", "work": 1.0, "throughput": [{"pool": "p", "devices": 1, "rate": 1.0}]}],
    }
    read = files.from_dict(data, folder=str(tmp_path))
    assert read.count[0].tolist() == [4, 4, 4, 1, 1] + [4] * 19
    assert read.price[0].tolist() == list(range(24)) == read.price[2].tolist()
    assert read.price[1].tolist() == [1.0] * 12 + [3.0] * 12


@pytest.mark.parametrize(
    "content, words",
    [
        (b"t,x\n2026-01-05T00:00,1\n2026-01-05T03:00\n", "pools[0].price: p.csv row 1: None is not a number"),
        (b"t,x\n2026-01-05T00:00,one\n", "pools[0].price: p.csv row 0: 'one' is not a number"),
        (b"t,x\n2026-01-05T00:00,nan\n", "pools[0].price: p.csv row 0: is nan"),
        (b"t,y\n2026-01-05T00:00,1\n", "pools[0].price.column: p.csv has no column 'x'"),
        (b"x\n1\n", "pools[0].price.time: p.csv has no column 't'"),
        (b"t,x\n2026-01-05T05:00,1\n", "pools[0].price.time: the times must rise and begin no later than slot 0"),
        (b"t,x\n\xff\xfe,1\n", "pools[0].price.csv: p.csv is no CSV file in UTF-8"),
    ],
)
def test_bad_csv_files_are_one_sentence(tmp_path, content, words):
    (tmp_path / "p.csv").write_bytes(content)
    pool = {"price": {"csv": "p.csv", "column": "x", "time": "t"}}
    with pytest.raises(ValueError) as error:
        problem(pool=pool, start="2026-01-05T00:00", folder=str(tmp_path))
    assert str(error.value).startswith(words), str(error.value)


def test_a_csv_file_of_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfx\r\n" + b"2\r\n" * 24)
    read = problem(pool={"price": {"csv": "p.csv", "column": "x"}}, folder=str(tmp_path))
    assert set(read.price[0]) == {2.0}


def test_what_is_shorter_than_any_sample_counts():
    """Five minutes without devices, and at twelve times the price: the slot has none, and costs twice as much."""
    times = {"from": "2000-01-01T01:02", "to": "2000-01-01T01:07"}
    pool = {"count": [{"value": 4}, {"value": 0, **times}], "price": [{"value": 1.0}, {"value": 13.0, **times}]}
    read = problem(pool=pool, slots=3)
    assert read.count[0].tolist() == [4, 0, 4] and read.price[0].tolist() == pytest.approx([1.0, 2.0, 1.0])


def test_values_within_a_slot_are_averaged_and_counts_take_the_least():
    ranges = [{"from": 0, "to": 0.5, "value": 2}, {"from": 0.5, "value": 4}]
    read = problem(pool={"count": ranges, "price": ranges}, slots=2, slot_hours=2.0)
    assert read.price[0].tolist() == [3.0, 4.0] and read.count[0].tolist() == [2, 4]


def test_daylight_saving():
    # Clocks in Berlin go from 02:00 to 03:00 on 2026-03-29 and from 03:00 back to 02:00 on 2026-10-25.
    spring = Clock("2026-03-29T00:00", "Europe/Berlin", 24, 1.0)
    assert spring.deadline("2026-03-29T04:00") == 3 and spring.label(2).endswith("03:00 CEST")
    with pytest.raises(ValueError, match="does not exist"):
        spring.deadline("2026-03-29T02:30")
    autumn = Clock("2026-10-25T00:00", "Europe/Berlin", 25, 1.0)
    assert autumn.deadline("2026-10-25T02:30") == 2 and autumn.release("2026-10-25T02:30") == 4
    profile = problem(pool={"price": list(range(24))}, slots=25, start="2026-10-25T00:00", tz="Europe/Berlin")
    assert profile.price[0].tolist() == [0, 1, 2, 2, *range(3, 24)]


def test_deadlines_are_never_stretched_nor_releases_moved_forward():
    clock = Clock("2026-01-05T00:00+01:00", "Asia/Kolkata", 10, 2.0)
    assert clock.deadline("2026-01-05T03:59+01:00") == 1 and clock.deadline("2026-01-05T04:00+01:00") == 2
    assert clock.release("2026-01-05T02:01+01:00") == 2 and clock.release("2026-01-05T02:00+01:00") == 1


def test_rates_are_interpolated_and_not_extrapolated():
    points = (Rate(pool="p", devices=2, rate=10.0), Rate(pool="p", devices=6, rate=20.0))
    job = Job(name="j", work=1.0, throughput=points, counts=(1, 2, 4, 6, 8))
    hourly = rates.hourly(job, Pool(name="p", count=8))
    assert hourly == {1: 5.0 * 3600, 2: 10.0 * 3600, 4: 15.0 * 3600, 6: 20.0 * 3600}
    spot = Pool(name="p", count=8, interruptions_per_hour=0.1, node_size=4)
    slow = rates.hourly(dataclasses.replace(job, checkpoint_every=1.0, restart=0.5), spot)
    assert slow == pytest.approx({n: hourly[n] / 1.1 for n in (1, 2, 4)})  # 6 is no whole number of nodes of 4
    assert rates.hourly(dataclasses.replace(job, memory=81), Pool(name="p", count=8, memory=80)) == {}


def test_replicas_are_copies_and_followers_wait_for_all():
    read = problem(jobs=[{"replicas": 2}, {"after": ("j0",)}]).expanded
    assert [job.name for job in read.jobs] == ["j0-1", "j0-2", "j1"] and read.jobs[2].after == ("j0-1", "j0-2")


def test_importing_loads_neither_torch_nor_scipy_nor_what_is_loaded_on_use():
    script = (
        "import json, sys, bigmodel.schedule as s; a = set(sys.modules); s.solve, s.load; b = set(sys.modules); "
        "print(json.dumps([sorted(a), sorted(b)]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, used = map(set, json.loads(out))
    assert not first & {"numpy", "scipy", "torch"}
    assert not used & {"torch", "pandas", "matplotlib", "tomli_w", "yaml", "scipy.optimize"}


def test_arrays_are_per_slot_values():
    assert problem(pool={"price": np.arange(24.0)}).price[0].tolist() == list(range(24))
