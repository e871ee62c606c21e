"""`make gpu`: the stages one after another, within a budget of seconds, into one record."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bigmodel.benchmarks.journal import Progress
from gpu import machine, text
from gpu.machine import ROOT, Machine, Unusable
from gpu.record import DONE, FAILED, PARTIAL, RUNNING, SKIPPED, Record
from gpu.stages import SHARE, STAGES, Context, Skipped, Work, cuda_tests

SAVE_SECONDS = 5.0
RENDER_SECONDS = 15.0
LOG_CHARACTERS = 6000  # of a stage in which something broke off: the log itself may be lost with the machine
LEAST_SECONDS = 8.0  # for less, no stage is begun
UNUSABLE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every stage asked for is done and nothing failed, 1 if not, 2 where it cannot start at all."""
    options = _parser().parse_args(argv)
    try:
        names = _stages(options.stages)
        found = machine.look(options.device)
    except Unusable as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return UNUSABLE
    options.results, options.work = options.results.resolve(), options.work.resolve()
    os.chdir(ROOT)  # where pip and pytest find what they are told
    commit, dirty = machine.tree()
    record = Record(options.results / found.slug, commit, dirty, found.to_dict())
    context = Context(found, options.work, options.tests.split() if options.tests else cuda_tests())
    context.work.mkdir(parents=True, exist_ok=True)
    # A run cut short leaves its record, and no process. What is ignored, as under nohup, stays so.
    handlers = {
        number: signal.signal(number, lambda number, frame: _interrupt(context, number))
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    _say(_opening(found, record, dirty))
    try:
        _run(names, record, context, options, dirty)
    except KeyboardInterrupt as stopped:
        _say(f"stopped{''.join(f' by {word}' for word in stopped.args)}; what was found is kept")
    finally:
        context.stop.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        record.save()
        written = _render(record, context)
    _print(text.summary(record))
    for path in [str(record.path), *written]:
        _say(f"wrote {path}")
    return 0 if all(text.passed(record.stage(name)) for name in names) else 1


def _interrupt(context: Context, number: int) -> None:
    context.stop.set()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--stages", default="", help="names with spaces between; default: all")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all stages")
    parser.add_argument("--again", action="store_true", help="run stages that are done for this commit again")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the records")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder of the build and the logs")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the stages out without a GPU"
    )
    parser.add_argument("--tests", help="arguments of pytest; default: the files with tests marked cuda, -m cuda")
    return parser


def _stages(words: str) -> list[str]:
    chosen = words.replace(",", " ").split()
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise Unusable(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}.")
    return [name for name in STAGES if not chosen or name in chosen]


def _opening(found: Machine, record: Record, dirty: bool) -> str:
    text = (
        f"{found.name}, driver {found.driver}, CUDA {found.cuda}, torch {found.torch}; commit {record.data['commit']}"
    )
    if found.missing:
        text += f"; not installed, and left out: {', '.join(found.missing)}"
    text += f"; peers: {', '.join(found.peers) or 'none'}"
    return text + ("; the tree was changed since the commit, so every stage runs" if dirty else "")


def _run(names: list[str], record: Record, context: Context, options: argparse.Namespace, dirty: bool) -> None:
    end = time.monotonic() + options.budget - RENDER_SECONDS
    stamp, key = context.work / "built", f"{record.data['commit']} {context.machine.to_dict()}"
    built = not dirty and context.site.is_dir() and stamp.exists() and stamp.read_text() == key
    built = built and "facts" in record.data
    pending = [name for name in names if options.again or not (_kept(record, name) and (name != "build" or built))]
    for name in names:
        if name not in pending:
            _say(f"{name}: done for this commit")
    if pending and not built and "build" not in pending:
        pending.insert(0, "build")
    for index, name in enumerate(pending):
        left = end - time.monotonic()
        # The build may take all of it, since nothing else can begin before it ends.
        share = 1 if name == "build" else SHARE[name] / sum(SHARE[each] for each in pending[index:])
        seconds = left * share
        if seconds < LEAST_SECONDS:
            _say(f"{name}: not begun, {max(left, 0):.0f} s of the budget are left")
            continue
        stamp.unlink(missing_ok=True) if name == "build" else None
        _stage(name, record, context, seconds, again=options.again)
        if name == "build":
            if record.stage(name)["state"] != DONE:
                return
            stamp.write_text(key)
            record.data["facts"] = record.stage(name)["done"]["facts"]["facts"]
            record.save()


def _render(record: Record, context: Context) -> list[str]:
    """Charts and tables, by the package that was built; the record stands without them."""
    command = [sys.executable, "-m", "gpu.render", str(record.path)]
    try:
        result = subprocess.run(command, env=context.environment(), capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        _say("no charts and tables: drawing them took too long")
        return []
    if result.stderr.strip():
        _say(f"drawing: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout.splitlines()


def _kept(record: Record, name: str) -> bool:
    """Whether a stage has ended, and each item of it too: what broke off is tried again in every run."""
    return record.stage(name).get("state") == DONE and not record.stage(name)["errors"]


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_CHARACTERS:] if log.exists() else ""


def _stage(name: str, record: Record, context: Context, seconds: float, again: bool) -> None:
    started, saved = time.monotonic(), 0.0
    spent = 0.0 if again else record.stage(name).get("seconds", 0.0)
    _say(f"{name}: up to {seconds:.0f} s, log in {context.work / name}.log")

    def save(progress: Progress, state: str = RUNNING, **more: object) -> None:
        record.update(name, progress, state=state, seconds=round(spent + time.monotonic() - started, 1), **more)

    def tick() -> None:
        nonlocal saved
        if context.stop.is_set():
            raise KeyboardInterrupt
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save(work.progress())

    before = {} if again else record.stage(name)
    known = Progress() if again else record.progress(name)
    if before.get("state") == DONE:
        known.errors.clear()
    work = Work(context, name, known, tick, before.get("tools"))
    try:
        ending = STAGES[name](work, seconds)
    except Skipped as why:
        save(known, SKIPPED, why=str(why), log=_end_of(work.log))
        _say(f"{name}: {text.line(record.stage(name))}")
        return
    except KeyboardInterrupt:
        context.stop.set()
        save(work.progress(), PARTIAL, **_tools(work))
        raise
    progress = work.progress()
    more = {"log": "", **_tools(work)}
    if ending is not None or progress.errors:
        more["log"] = _end_of(work.log)
    if ending is not None and not progress.left and progress.done:
        ending = None  # it fell at the last item, whose error says so
    if ending is not None or (name == "build" and progress.errors):
        state = FAILED
    else:
        state = PARTIAL if progress.left or not progress.plan else DONE
    save(progress, state, why=ending or "", **more)
    _say(f"{name}: {text.line(record.stage(name))}")


def _tools(work: Work) -> dict[str, object]:
    return {"tools": work.tools} if work.tools else {}


def _say(text: str) -> None:
    _print(f"make gpu: {text}")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # of a terminal that is gone: the record is what counts
        print(text, flush=True)
