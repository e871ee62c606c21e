"""What the tests of more than 2^31 elements share: where they run, and the memory that they need there."""

from __future__ import annotations

import pytest
import torch

LARGE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def free_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**20


def need_gib(device: str, needed: float) -> None:
    free = free_gib(device)
    if free < needed:
        pytest.skip(f"needs {needed} GiB of free memory on {device}, {free:.0f} are free")
