"""A problem that can be checked by hand."""

from bigmodel import schedule
from bigmodel.schedule import Job, Pool, Problem, Rate


def problem(**more):
    """One device at 1 an hour, one at 3; a job of 6 hours with a restart of half an hour."""
    points = tuple(Rate(pool=pool, devices=1, rate=1 / 3600) for pool in ("cheap", "dear"))
    pools = (Pool(name="cheap", count=1, price=1.0), Pool(name="dear", count=1, price=3.0))
    job = Job(**{"name": "long", "work": 6.0, "throughput": points, "restart": 0.5, "deadline": 12} | more)
    return Problem(slots=12, pools=pools, jobs=(job,))


def plan(**more):
    return schedule.solve(problem(**more), gap=1e-6)
