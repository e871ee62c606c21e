"""What is left of pools and quotas while devices are handed out to one job after the other."""

from __future__ import annotations

import numpy as np

from bigmodel.schedule.problem import Problem


class Free:
    """Devices that are not taken, within quotas. count: (pools, slots)."""

    def __init__(self, problem: Problem, count: np.ndarray):
        self.count = count.copy()
        self.quota = {group: np.full(count.shape[1], limit) for group, limit in problem.quotas.items()}
        self.group = [pool.quota_group for pool in problem.pools]

    def room(self, p: int, slots: int = 1) -> int:
        """Devices of pool p that are left throughout the first `slots` slots."""
        group = self.group[p]
        left = self.count[p] if group is None else np.minimum(self.count[p], self.quota[group])
        return int(left[:slots].min())

    def take(self, p: int, n: int, slots: int = 1) -> bool:
        """Whether n devices of pool p were left for so long, which are then taken."""
        if self.room(p, slots) < n:
            return False
        self.count[p, :slots] -= n
        group = self.group[p]
        if group is not None:
            self.quota[group][:slots] -= n
        return True
