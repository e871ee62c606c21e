"""A plan that several tests show and emit."""

import numpy as np

from bigmodel.schedule import Job, Plan, Pool, Problem, Rate
from bigmodel.schedule.plan import StageResult

NASTY = 'it\'s $(touch /tmp/never) $(HOME) $$ `x` "y" \\'


def sample_plan():
    """Three jobs: `first` in two runs on two nodes, `second` after it, `spare` dropped."""
    gpus = (Rate(pool="gpu", devices=16, rate=1 / 3600), Rate(pool="gpu", devices=8, rate=0.6 / 3600))
    more = {"image": "train:1", "data_gb": 80.0}
    jobs = (
        Job(name="first", work=2.0, throughput=gpus, command="python a.py", env={"KEY": NASTY}, owner="x", **more),
        Job(name="second", work=1.0, throughput=gpus, command="python b.py", after=("first",), owner="y", **more),
        Job(name="spare", work=1.0, throughput=gpus, value=0.1, command="c", **more),
    )
    pool = Pool(
        name="gpu", count=16, price=[1.0] * 12 + [2.0] * 12, node_size=8, ownership="spot", partition="long",
        gres="gpu:a100",        accelerator="A100", queue="team", fixed_cost=5.0, interruptions_per_hour=0.0,
    )  # fmt: skip
    problem = Problem(slots=8, start="2026-03-29T00:00", tz="Europe/Berlin", pools=(pool,), jobs=jobs)
    table = np.zeros((3, 1, 8), dtype=int)
    table[0, 0, [0, 3]] = table[1, 0, 4] = 16
    found = Plan(problem, table, "optimal", (StageResult("cost", 48.1, 48.1),), True, 0.0)
    assert found.account.violations == []
    return found
