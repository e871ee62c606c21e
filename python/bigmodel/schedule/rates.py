"""Throughput of a job on so many devices of a pool, from its points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Job, Pool, Rate


def points(job: Job, pool: str) -> list[tuple[int, float]]:
    """The job's (devices, rate) on a pool, rising in devices; no devices give no work."""
    return [(0, 0.0), *sorted((point.devices, point.rate) for point in job.throughput if point.pool == pool)]


def interpolate(known: list[tuple[int, float]], devices: np.ndarray) -> np.ndarray:
    """Rates on `devices`, linear between neighbouring points; from 1 device up to the last point's."""
    count, rate = (np.array(column) for column in zip(*known, strict=True))
    above = np.searchsorted(count, devices)
    below = above - 1
    return rate[below] + (rate[above] - rate[below]) * (devices - count[below]) / (count[above] - count[below])


def behind(job: Job, pool: str, devices: int) -> list[Rate]:
    """The points that a rate on `devices` comes from: its own, or its neighbours."""
    known = sorted((point for point in job.throughput if point.pool == pool), key=lambda point: point.devices)
    below = [point for point in known if point.devices <= devices][-1:]
    above = [point for point in known if point.devices >= devices][:1]
    return below if below == above else below + above


def slowdown(job: Job, pool: Pool) -> float:
    """The share of planned throughput that a spot pool is expected to give.

    1 / (1 + rate x (checkpoint_every / 2 + restart)): each interruption loses half a checkpoint's interval of work and
    a restart, and takes the time that both cost to make up.
    """
    return 1.0 / (1.0 + pool.interruptions_per_hour * (job.checkpoint_every / 2 + job.restart))


def counts(job: Job, pool: Pool) -> list[int]:
    """Device counts on which the job may run in the pool: those with a rate, by whole nodes above one node."""
    known = points(job, pool.name)
    most = known[-1][0]
    if job.counts is not None:
        allowed = sorted(set(job.counts))
    elif job.mix_pools:
        allowed = list(range(1, most + 1))
    else:
        allowed = [devices for devices, _ in known[1:]]
    node = pool.node_size
    fits = [n for n in allowed if 0 < n <= most and (node is None or n <= node or n % node == 0)]
    return fits if pool.memory is None or job.memory <= pool.memory else []


def hourly(job: Job, pool: Pool) -> dict[int, float]:
    """Work per hour by device count, after what interruptions are expected to cost."""
    devices = counts(job, pool)
    if not devices:
        return {}
    rate = interpolate(points(job, pool.name), np.array(devices)) * 3600.0 * slowdown(job, pool)
    return dict(zip(devices, rate.tolist(), strict=True))
