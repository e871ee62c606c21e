"""`bigmodel plan`: arguments in, one call, text out."""

from __future__ import annotations

import argparse
import sys
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
    command.add_argument("--time-limit", type=float, default=30.0, metavar="S", help="seconds (default 30)")
    command.add_argument("--gap", type=float, default=0.01, metavar="G", help="stop at this proven gap (default 0.01)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--replan", metavar="NOW", help="plan the plan of an earlier --json again from a slot or time")
    command.add_argument("--changes", type=Path, metavar="FILE", help="what has changed by --replan: .toml or .json")
    command.add_argument("--emit", choices=("slurm", "skypilot", "kueue"), help="write what this engine runs")
    command.add_argument("--out", type=Path, default=Path("plan"), metavar="DIR", help="where --emit writes")
    command.set_defaults(action=run)
    sizing = command.add_argument_group("estimate", "device-hours and memory before there is a measurement")
    sizing.add_argument("--params", type=float, metavar="N")
    sizing.add_argument("--tokens", type=float, metavar="D")
    sizing.add_argument("--device", metavar="NAME")
    sizing.add_argument("--mfu", type=float, metavar="SHARE", help="default 0.4")
    sizing.add_argument("--sequence", type=int, help="default 2048")
    sizing.add_argument("--micro-batch", type=int, help="default 1")


def run(arguments: argparse.Namespace) -> int:
    from bigmodel.schedule import files

    if arguments.example:
        print(files.example(), end="")
        return 0
    if arguments.problem is None:
        raise ValueError("a problem file is missing; --example prints one to start from.")
    if arguments.problem == "estimate":
        return _estimate(arguments)
    given = [name for name in _SIZING if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to 'bigmodel plan estimate'.")
    if arguments.replan is not None:
        from bigmodel.schedule import replanning

        if arguments.check:
            raise ValueError("--check is of a problem; --replan checks the plan that it reads.")
        return _solve(arguments, *replanning.again(arguments.problem, arguments.replan, arguments.changes))
    if arguments.changes is not None:
        raise ValueError("--changes belongs to --replan.")
    problem = files.load(arguments.problem)
    if arguments.check:
        copies = len(problem.expanded.jobs)
        print(f"{arguments.problem}: valid; {copies} jobs, {len(problem.pools)} pools, {problem.slots} slots")
        return 0
    from bigmodel.schedule import solver

    return _solve(arguments, partial(solver.solve, problem))


_SIZING = ("params", "tokens", "device", "mfu", "sequence", "micro_batch")


def _estimate(arguments: argparse.Namespace) -> int:
    from bigmodel.schedule import sizing

    given = {name: getattr(arguments, name) for name in _SIZING if getattr(arguments, name) is not None}
    for name in ("params", "tokens", "device"):
        if name not in given:
            raise ValueError(f"estimate: --{name} is missing.")
    print(sizing.estimate(**given).table())
    return 0


def _solve(arguments: argparse.Namespace, solve, before=None) -> int:
    """Plans and prints; `before` is the plan that is planned again."""
    from bigmodel.schedule import errors, plot

    if arguments.gantt is not None and arguments.gantt.suffix not in plot.SUFFIXES:
        raise ValueError(f"--gantt {arguments.gantt} must end in {', '.join(plot.SUFFIXES)}.")
    try:
        plan = solve(
            time_limit=arguments.time_limit,
            gap=arguments.gap,
            seed=arguments.seed,
            progress=_progress if sys.stderr.isatty() else None,
        )
    except errors.Infeasible as error:
        print(error, file=sys.stderr)
        return 3
    except errors.Unknown as error:
        print(error, file=sys.stderr)
        return 130 if "interrupted" in str(error) else 4
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
        from bigmodel.schedule import emit

        for remark in emit.write(plan, arguments.emit, arguments.out):
            print(f"{arguments.emit}: {remark}")
    return 130 if "interrupted" in plan.status else 0


def _progress(value: float, bound: float, seconds: float) -> None:
    gap = f"{(value - bound) / abs(value):.2%}" if value not in (0.0, float("inf")) and bound > -float("inf") else "-"
    print(
        f"\rincumbent {value:.6g}  bound {bound:.6g}  gap {gap}  {seconds:.1f} s   ",
        end="",
        file=sys.stderr,
        flush=True,
    )
