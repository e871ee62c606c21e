"""Runs groups of benchmarks: each way of allocating memory in a process of its own, then a report for each group."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeVar

import torch

from bigmodel import info
from bigmodel.benchmarks import load_group
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, judge
from bigmodel.benchmarks.harness import FLOATS, FULL, FULL_CUDA, QUICK, Case, Measurement, in_a_line, measure, timer_for
from bigmodel.benchmarks.journal import Journal, Progress, read
from bigmodel.benchmarks.report import Report

# What a process inherits decides how stock torch gets fresh memory, so each kind is a process of its own.
ENVIRONMENTS = {DEFAULT_PAGES: {}, HUGE_PAGES: {"THP_MEM_ALLOC_ENABLE": "1"}}
_LEVERS = sorted({name for variables in ENVIRONMENTS.values() for name in variables})
ALL = ("norm", "softmax", "adam")  # what `bigmodel bench --all` measures in full
OVERVIEW_SECONDS = (
    120  # of `bigmodel bench` without a group; the case in hand and the start of two processes come on top
)
DEVICE_LOST = 3  # exit status of a process whose CUDA context is broken: the cases left need another one

Item = TypeVar("Item")


def default_device() -> str:
    """ "cuda" where bigmodel was built with it and torch sees a device, else "cpu"."""
    return "cuda" if info.collect()["cuda"]["built"] and torch.cuda.is_available() else "cpu"


def run(group: str, *, device: str | None = None, quick: bool = False, sweep: bool = False) -> Report:
    """Measures a group and judges its goals: run_groups for one."""
    return run_groups([group], device=device, quick=quick, sweep=sweep)[0]


def run_groups(
    groups: Sequence[str],
    *,
    device: str | None = None,
    quick: bool = False,
    sweep: bool = False,
    seconds: float | None = None,
) -> list[Report]:
    """Measures groups and judges their goals. A case that fails is reported, and the others are measured.

    Args:
        groups: some of bigmodel.benchmarks.GROUPS.
        device: "cpu" or "cuda"; None takes the better one that is usable.
        quick: a few cases and rounds, under a minute a group on 2 CPU cores; the figures are rough.
        sweep: also the row lengths of the chart (on a full run on CUDA they are always measured).
        seconds: begin no case after them; what is most telling comes first, and the reports name what is left.

    Raises:
        ValueError: an unknown group or device.
        RuntimeError: a measuring process failed; its own words are on stderr.
    """
    for group in groups:
        load_group(group)
    device = device or default_device()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {device!r}, accepted are 'cpu' and 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device is 'cuda', but torch sees no CUDA device.")
    sweep = sweep or (device == "cuda" and not quick)
    kinds = list(ENVIRONMENTS) if device == "cpu" else [DEFAULT_PAGES]
    share = None if seconds is None else seconds / len(kinds)
    found = {
        pages: measure_in_process(groups, device, pages, quick=quick, sweep=sweep, seconds=share) for pages in kinds
    }
    facts, state = info.collect(), commit()
    return [report_of(group, found, device=device, quick=quick, facts=facts, commit=state) for group in groups]


def report_of(
    group: str, found: Mapping[str, Progress], *, device: str, quick: bool, facts: dict, commit: str | None
) -> Report:
    """The report of one group from what its processes journaled, by kind of process."""
    measurements: dict[str, list[Measurement]] = {}
    failed: dict[str, str] = {}
    left = []
    for pages, progress in found.items():
        items = [item for item in progress.plan if item.startswith(f"{group}: ")]
        where = f", {pages}" if device == "cpu" else ""
        names = {item: item.removeprefix(f"{group}: ") for item in items}
        measurements[pages] = [
            Measurement.from_dict(progress.done[item]["row"]) for item in items if item in progress.done
        ]
        failed |= {names[item] + where: progress.errors[item] for item in items if item in progress.errors}
        left += [names[item] + where for item in items if item in progress.left]
    return Report(
        group=group,
        device=device,
        quick=quick,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        facts=facts,
        measurements=measurements,
        verdicts=judge(load_group(group).goals(device), measurements),
        failed=failed,
        left=left,
    )


def measure_in_process(
    groups: Sequence[str], device: str, pages: str, *, quick: bool, sweep: bool, seconds: float | None = None
) -> Progress:
    """Runs `measure_groups` in a fresh process whose environment allocates as `pages` says."""
    environment = {name: value for name, value in os.environ.items() if name not in _LEVERS} | ENVIRONMENTS[pages]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal")
        command = process_command(groups, device, pages, path, quick=quick, sweep=sweep, seconds=seconds)
        status = subprocess.run(command, env=environment).returncode
        progress = read(path)
    if status and not progress.done:
        raise RuntimeError(f"bench: measuring {', '.join(groups)} with {pages} ended with exit status {status}.")
    return progress


def process_command(
    groups: Sequence[str],
    device: str,
    pages: str,
    journal: Path,
    *,
    quick: bool = False,
    sweep: bool = False,
    seconds: float | None = None,
    python: str = sys.executable,
) -> list[str]:
    """The command of a process that measures groups into a journal."""
    command = [python, "-m", "bigmodel.benchmarks", *groups, "--device", device, "--pages", pages]
    command += [flag for flag, wanted in (("--quick", quick), ("--sweep", sweep)) if wanted]
    command += [] if seconds is None else ["--seconds", f"{seconds:.1f}"]
    return [*command, "--journal", str(journal)]


def measure_groups(
    groups: Sequence[str],
    device: str,
    journal: Journal,
    *,
    quick: bool,
    sweep: bool,
    seconds: float | None = None,
    label: str = "",
) -> None:
    """Measures every case of the groups in this process into a journal, with a progress bar if stderr is a terminal."""
    end = None if seconds is None else time.monotonic() + seconds
    effort = QUICK if quick else FULL if device == "cpu" else FULL_CUDA
    cases: dict[str, Case] = {}
    unknown: dict[str, str] = {}
    for group in groups:
        try:
            found = load_group(group).cases(device, quick=quick, sweep=sweep)
        except ImportError as error:
            unknown[f"{group}: every case"] = in_a_line(error)
        else:
            cases |= {f"{group}: {case.name}": case for case in found}
    left = journal.plan([*cases, *unknown])
    for item, text in unknown.items():
        journal.error(item, text)
    todo = [item for item in left if item in cases]
    if end is not None:
        todo = telling_first({item: cases[item] for item in todo})
    timer = timer_for(device) if todo else None
    for item in _progress(todo, f"{groups[0] if len(groups) == 1 else 'all'}, {label}"):
        if timer is None or (end is not None and time.monotonic() > end):
            break
        journal.begin(item)
        try:
            row = measure(cases[item], timer, effort)
        except Exception as error:
            traceback.print_exc()
            journal.error(item, in_a_line(error))
            if device == "cuda" and _lost():
                sys.exit(DEVICE_LOST)
        else:
            journal.end(item, row=row.to_dict())
        gc.collect()  # a case may hold most of a device's memory, and autograd's closures hold each other


def _lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def telling_first(cases: Mapping[str, Case]) -> list[str]:
    """The items in an order that tells most when it is broken off.

    The groups take turns; in each, so do the series of one op, mode and dtype. Two points over row lengths, by which
    the goals on CUDA are judged, come for each line of the table. Such a series begins in its middle, then come the
    middles of its halves; the dtypes that only show that they run come after the first two turns of the others. A
    series of the table goes as it is listed.
    """
    groups: dict[str, tuple[dict, dict, dict]] = {}
    for item, case in cases.items():
        lines, points, further = groups.setdefault(item.split(":")[0], ({}, {}, {}))
        series = lines if not case.sweep else points if case.dtype in FLOATS else further
        series.setdefault((case.op, case.mode, case.dtype), []).append(item)
    orders = []
    for lines, points, further in groups.values():
        swept = _in_turns([items[index] for index in halving(len(items))] for items in points.values())
        swept[2 * len(points) : 2 * len(points)] = _in_turns(further.values())
        orders.append(_in_turns([swept[::2], swept[1::2], _in_turns(lines.values())]))
    return _in_turns(orders)


def _in_turns(lists: Iterable[Sequence[str]]) -> list[str]:
    """The first of each, then the second of each, and so on."""
    return [item for item in chain.from_iterable(zip_longest(*lists)) if item is not None]


def halving(count: int) -> Iterator[int]:
    """0 to count - 1 in the order middle, middles of the halves, of the quarters, and so on."""
    spans = [(0, count)]
    for low, high in spans:
        if low < high:
            middle = (low + high) // 2
            yield middle
            spans += [(low, middle), (middle + 1, high)]


def _progress(items: Sequence[Item], label: str) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:  # comes with bigmodel[bench]
        return _counted(items, label) if sys.stderr.isatty() else items
    return tqdm(items, desc=label, unit="case", disable=None)


def _counted(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items, and one line on stderr that says how many are done."""
    try:
        for index, item in enumerate(items):
            print(f"\r{label}: {index}/{len(items)} cases", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print(file=sys.stderr)


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
