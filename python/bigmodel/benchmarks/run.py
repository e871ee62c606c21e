"""Runs a group of benchmarks: each way of allocating memory in a process of its own, then one report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch

from bigmodel import info
from bigmodel.benchmarks import load_group
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, judge
from bigmodel.benchmarks.harness import FULL, QUICK, Measurement, measure, timer_for
from bigmodel.benchmarks.report import Report

# What a process inherits decides how stock torch gets fresh memory, so each kind is a process of its own.
ENVIRONMENTS = {DEFAULT_PAGES: {}, HUGE_PAGES: {"THP_MEM_ALLOC_ENABLE": "1"}}
_LEVERS = sorted({name for variables in ENVIRONMENTS.values() for name in variables})

Item = TypeVar("Item")


def default_device() -> str:
    """ "cuda" where bigmodel was built with it and torch sees a device, else "cpu"."""
    return "cuda" if info.collect()["cuda"]["built"] and torch.cuda.is_available() else "cpu"


def run(group: str, *, device: str | None = None, quick: bool = False, sweep: bool = False) -> Report:
    """Measures a group and judges its goals.

    Args:
        group: one of bigmodel.benchmarks.GROUPS.
        device: "cpu" or "cuda"; None takes the better one that is usable.
        quick: a few cases and rounds, under a minute on 2 CPU cores; its figures are rough.
        sweep: also the row lengths of the chart (on a full run on CUDA they are always measured).

    Raises:
        ValueError: an unknown group or device.
        RuntimeError: a measuring process failed; its own words are on stderr.
    """
    module = load_group(group)
    device = device or default_device()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {device!r}, accepted are 'cpu' and 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device is 'cuda', but torch sees no CUDA device.")
    sweep = sweep or (device == "cuda" and not quick)
    kinds = list(ENVIRONMENTS) if device == "cpu" else [DEFAULT_PAGES]
    measurements = {pages: measure_in_process(group, device, pages, quick=quick, sweep=sweep) for pages in kinds}
    return Report(
        group=group,
        device=device,
        quick=quick,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        facts=info.collect(),
        measurements=measurements,
        verdicts=judge(module.goals(device), measurements),
    )


def measure_in_process(group: str, device: str, pages: str, *, quick: bool, sweep: bool) -> list[Measurement]:
    """Runs `measure_group` in a fresh process whose environment allocates as `pages` says."""
    environment = {name: value for name, value in os.environ.items() if name not in _LEVERS} | ENVIRONMENTS[pages]
    flags = [flag for flag, wanted in (("--quick", quick), ("--sweep", sweep)) if wanted]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measurements.json")
        command = [sys.executable, "-m", "bigmodel.benchmarks", group, "--device", device, "--pages", pages, *flags]
        status = subprocess.run([*command, "--out", str(out)], env=environment).returncode
        if status:
            raise RuntimeError(f"bench: measuring {group} with {pages} ended with exit status {status}.")
        return [Measurement.from_dict(record) for record in json.loads(out.read_text())]


def measure_group(group: str, device: str, *, quick: bool, sweep: bool, label: str = "") -> list[Measurement]:
    """Measures every case of a group in this process, with a progress bar if stderr is a terminal."""
    timer, effort = timer_for(device), QUICK if quick else FULL
    cases = load_group(group).cases(device, quick=quick, sweep=sweep)
    return [measure(case, timer, effort) for case in _progress(cases, f"{group}, {label}")]


def _progress(items: Sequence[Item], label: str) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:  # comes with bigmodel[bench]; the figures do not need it
        return items
    return tqdm(items, desc=label, unit="case", disable=None)


def commit() -> str | None:
    """The commit of the bigmodel checkout that this package lies in, with "-dirty" if it was changed; else None."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or not Path(top, "csrc", "bind.cpp").is_file():
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
