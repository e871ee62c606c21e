"""Throughput of a job on so many devices of a pool, from its points."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Job, Pool, Rate


def points(job: Job, pool: str) -> list[tuple[int, float]]:
    """The job's (devices, rate) on a pool, rising in devices; no devices give no work."""
    return [(0, 0.0), *sorted((point.devices, point.rate) for point in job.throughput if point.pool == pool)]


def interpolate(known: list[tuple[int, float]], devices: int) -> float:
    """Rate on `devices`: linear between neighbouring points; 0 above the last, where nothing is known."""
    for (below, low), (above, high) in zip(known, known[1:], strict=False):
        if below < devices <= above:
            return low + (high - low) * (devices - below) / (above - below)
    return 0.0


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
    known = points(job, pool.name)
    share = slowdown(job, pool)
    return {devices: interpolate(known, devices) * 3600.0 * share for devices in counts(job, pool)}
