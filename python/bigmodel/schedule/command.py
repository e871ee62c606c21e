"""`bigmodel plan`: arguments in, one call, text out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

_EPILOG = """exit status: 0 a plan, or --check found nothing wrong; 1 the problem is not valid, or a file cannot be
read or written; 2 wrong arguments; 3 there is no plan (why, and what would help, is on stderr); 4 time ran out,
or the solver's process was killed, before a plan was found; 130 interrupted (the best plan so far is printed)"""


def add_to(commands) -> None:
    """Adds `plan` to the subcommands of `bigmodel`."""
    command = commands.add_parser("plan", help="where and when each GPU-hour goes", epilog=_EPILOG)
    command.add_argument(
        "problem", nargs="?", help="a .toml or .json file, or the word 'estimate' (see estimate --help)"
    )
    command.add_argument("--example", action="store_true", help="print a problem to start from")
    command.add_argument("--check", action="store_true", help="only validate the problem")
    command.add_argument("--gantt", type=Path, metavar="FILE", help="draw the plan: .png, .svg or .html")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plan here")
    seconds, share = _number(float, 0.0, above=True), _number(float, 0.0)
    command.add_argument("--time-limit", type=seconds, metavar="S", help="seconds (default 30)")
    command.add_argument("--gap", type=share, metavar="G", help="stop at this proven gap (default 0.01)")
    command.add_argument("--seed", type=_number(int, 0), help="default 0")
    command.add_argument("--replan", metavar="NOW", help="plan the plan of an earlier --json again from a slot or time")
    command.add_argument("--changes", type=Path, metavar="FILE", help="what has changed by --replan: .toml or .json")
    command.add_argument("--emit", choices=("slurm", "skypilot", "kueue"), help="write what this engine runs")
    command.add_argument("--out", type=Path, metavar="DIR", help="where --emit writes (default plan)")
    command.set_defaults(action=run)
    sizing = command.add_argument_group("estimate", "device-hours and memory before there is a measurement")
    sizing.add_argument("--params", type=float, metavar="N")
    sizing.add_argument("--tokens", type=float, metavar="D")
    sizing.add_argument("--device", metavar="NAME")
    sizing.add_argument("--mfu", type=float, metavar="SHARE", help="default 0.4")
    sizing.add_argument("--sequence", type=int, help="default 2048")
    sizing.add_argument("--micro-batch", type=int, help="default 1")


def _number(kind: Callable[[str], float], least: float, *, above: bool = False) -> Callable[[str], float]:
    """Reads an argument of at least `least` (`above`: more than it)."""

    def read(text: str) -> float:
        value = kind(text)
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"is {text}; it must be {'above' if above else 'at least'} {least:g}")
        return value

    read.__name__ = kind.__name__  # argparse tells it where `kind` refuses
    return read


_SOLVING = ("time_limit", "gap", "seed")
_PLANNING = ("gantt", "json", *_SOLVING, "replan", "changes", "emit", "out")
_SIZING = ("params", "tokens", "device", "mfu", "sequence", "micro_batch")


def run(arguments: argparse.Namespace) -> int:
    from bigmodel.schedule import files

    if arguments.example:
        _refuse(arguments, "--example", "problem", "check", *_PLANNING, *_SIZING)
        print(files.example(), end="")
        return 0
    if arguments.problem is None:
        raise _wrong("a problem file is missing; --example prints one to start from.")
    if arguments.problem == "estimate":
        _refuse(arguments, "estimate", "check", *_PLANNING)
        return _estimate(arguments)
    _refuse(arguments, "a problem, unlike 'bigmodel plan estimate',", *_SIZING)
    if arguments.check:
        _refuse(arguments, "--check", *_PLANNING)
    if arguments.emit is None:
        _refuse(arguments, "a plan without --emit", "out")
    if arguments.replan is None:
        _refuse(arguments, "a plan without --replan", "changes")
    else:
        from bigmodel.schedule import replanning

        again, before = replanning.again(arguments.problem, arguments.replan, arguments.changes)
        return _solve(arguments, before.problem, again, before)
    problem = files.load(arguments.problem)
    if arguments.check:
        copies = len(problem.expanded.jobs)
        print(f"{arguments.problem}: valid; {copies} jobs, {len(problem.pools)} pools, {problem.slots} slots")
        return 0
    from bigmodel.schedule import solver

    return _solve(arguments, problem, partial(solver.solve, problem))


def _wrong(text: str) -> argparse.ArgumentError:
    """What gives exit status 2."""
    return argparse.ArgumentError(None, text)


def _refuse(arguments: argparse.Namespace, what: str, *names: str) -> None:
    """For each argument of `names` that was given, since `what` would ignore it."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise _wrong(f"{what} takes no {'problem' if name == 'problem' else '--' + name.replace('_', '-')}.")


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _estimate(arguments: argparse.Namespace) -> int:
    from bigmodel.schedule import sizing

    given = _given(arguments, _SIZING)
    for name in ("params", "tokens", "device"):
        if name not in given:
            raise _wrong(f"estimate: --{name} is missing.")
    try:
        print(sizing.estimate(**given).table())
    except ValueError as error:
        raise _wrong(str(error)) from None
    return 0


def _solve(arguments: argparse.Namespace, problem, solve, before=None) -> int:
    """Plans and prints; `before` is the plan that is planned again."""
    from bigmodel.schedule import emit, errors

    out = arguments.out or Path("plan")
    _check_outputs(arguments, problem, out)
    try:
        plan = solve(
            progress=_progress if sys.stderr.isatty() else None,
            **_given(arguments, _SOLVING),
        )
    except errors.Infeasible as error:
        print(error, file=sys.stderr)
        return 3
    except errors.Unknown as error:
        print(error, file=sys.stderr)
        return 130 if error.interrupted else 4
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    print(plan.table())
    for line in plan.prices():
        print(line)
    if before is not None:
        print(before.diff(plan))
    if arguments.gantt is not None:
        plan.gantt(arguments.gantt)
    if arguments.json is not None:
        arguments.json.write_text(plan.to_json() + "\n")
    if arguments.emit is not None:
        for remark in emit.write(plan, arguments.emit, out):
            print(f"{arguments.emit}: {remark}")
    return 130 if plan.interrupted else 0


def _check_outputs(arguments: argparse.Namespace, problem, out: Path) -> None:
    """Raises now, not after the time limit, for what could not be written."""
    from bigmodel.schedule import emit, plot

    if arguments.gantt is not None:
        try:
            plot.check(arguments.gantt)
        except ValueError as error:
            raise _wrong(f"--{error}") from None
    for path in (arguments.gantt, arguments.json):
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            raise PermissionError(f"{path} cannot be written.")
    if arguments.emit is not None:
        emit.check(problem, arguments.emit, out)


def _progress(value: float, bound: float, seconds: float) -> None:
    gap = f"{(value - bound) / abs(value):.2%}" if value not in (0.0, float("inf")) and bound > -float("inf") else "-"
    print(
        f"\rincumbent {value:.6g}  bound {bound:.6g}  gap {gap}  {seconds:.1f} s   ",
        end="",
        file=sys.stderr,
        flush=True,
    )
