"""The `bigmodel` command: arguments in, one call, text out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; an error is one sentence on stderr and status 1, or 2 where the
    subcommand calls its arguments wrong."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments) or 0
    except argparse.ArgumentError as error:
        print(f"bigmodel {arguments.command}: {error}", file=sys.stderr)
        return 2
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"bigmodel {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from bigmodel import __version__
    from bigmodel.benchmarks import GROUPS

    parser = argparse.ArgumentParser(prog="bigmodel", description="Fused training ops for PyTorch, and a planner.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("info", help="what this install can do, and where it runs")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(action=_info)

    command = commands.add_parser(
        "bench",
        help="time the ops against stock torch, torch.compile and a copy",
        epilog="exit status: 0 measured; 1 a case failed, or a file cannot be read or written; 2 wrong arguments",
    )
    command.add_argument(
        "group",
        nargs="?",
        choices=(*GROUPS, "plan"),
        help="which ops, or the planner's gaps; none: something of every group in under three minutes",
    )
    command.add_argument("--all", action="store_true", help="norm, softmax and adam in full, over the row lengths too")
    command.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="what moved between two runs"
    )
    command.add_argument(
        "--throughput",
        action="store_true",
        help="tokens/s of a training step on this machine, as `bigmodel plan` reads it",
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is usable")
    command.add_argument("--quick", action="store_true", help="few cases, few rounds: under a minute, rough figures")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    command.add_argument("--report", type=Path, metavar="FILE.html", help="write one self-contained page here")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="measure a range of row lengths too and draw the bandwidth here"
    )
    command.add_argument("--size", nargs="+", metavar="JOBSxPOOLSxSLOTS", help="plan: these sizes alone")
    command.add_argument(
        "--stop-after",
        type=float,
        metavar="S",
        help="begin no measurement after so many seconds; what is left is named (plan: the same command goes on with "
        "the file of --json)",
    )
    command.set_defaults(action=_bench)

    from bigmodel.schedule import command as planner

    planner.add_to(commands)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    from bigmodel import info

    facts = info.collect()
    print(json.dumps(facts, indent=1) if arguments.json else info.render(facts))


def _bench(arguments: argparse.Namespace) -> int | None:
    if arguments.throughput:
        _throughput(arguments)
    elif arguments.compare is not None:
        _compare(arguments)
    elif arguments.group == "plan":
        _bench_plan(arguments)
    else:
        return _bench_groups(arguments)
    return None


def _bench_groups(arguments: argparse.Namespace) -> int | None:
    from bigmodel.benchmarks import GROUPS, page, plot, report, run

    _refuse(arguments, arguments.group or "bench", "size")
    if arguments.all:
        _refuse(arguments, "--all", "group")
    if arguments.stop_after is not None and not arguments.stop_after > 0:
        raise _wrong(f"--stop-after is {arguments.stop_after:g}, it must be positive.")
    _check_folders(arguments)
    overview = arguments.group is None and not arguments.all
    if overview and arguments.plot is not None:
        raise _wrong("--plot draws row lengths: name a group, or give --all.")
    if arguments.plot is not None:
        plot.require_matplotlib()
    reports = run.run_groups(
        GROUPS if overview else run.ALL if arguments.all else [arguments.group],
        device=arguments.device,
        quick=arguments.quick or overview,
        sweep=arguments.plot is not None or arguments.all,
        seconds=run.OVERVIEW_SECONDS if overview and arguments.stop_after is None else arguments.stop_after,
    )
    if arguments.json is not None:
        arguments.json.write_text(report.to_json(reports))
    print(report.overview(reports) if overview else report.to_markdown(reports), end="")
    if arguments.report is not None:
        arguments.report.write_text(page.to_html(reports), encoding="utf-8")
    if arguments.plot is not None:
        for each in reports:
            plot.draw(each, arguments.plot if len(reports) == 1 else plot.path_of(arguments.plot, each.group))
    return 1 if any(each.failed for each in reports) else None


def _wrong(text: str) -> argparse.ArgumentError:
    """What gives exit status 2."""
    return argparse.ArgumentError(None, text)


def _refuse(arguments: argparse.Namespace, what: str, *names: str) -> None:
    """A wrong argument for each of `names` that was given, since `what` would ignore it."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            shown = "group" if name == "group" else f"--{name.replace('_', '-')}"
            raise _wrong(f"{what} takes no {shown}.")


def _check_folders(arguments: argparse.Namespace) -> None:
    for path in (arguments.json, arguments.plot, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise _wrong(f"the folder of {path} does not exist.")


def _compare(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import compare

    _refuse(arguments, "--compare", "group", "all", "device", "quick", "json", "plot", "report", "size", "stop_after")
    print(compare.to_markdown(*map(compare.load, arguments.compare)), end="")


def _throughput(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import throughput

    _refuse(arguments, "--throughput", "group", "all", "compare", "plot", "report", "size", "stop_after")
    _check_folders(arguments)
    points = throughput.measure(arguments.device, quick=arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"throughput": points}, indent=1) + "\n")
    print(throughput.to_toml(points), end="")


def _bench_plan(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import planner

    _refuse(arguments, "plan", "device", "all", "plot", "report")
    sizes = arguments.size or planner.SIZES
    for size in sizes:
        if size not in planner.SIZES:
            raise _wrong(f"--size {size} is none of {', '.join(planner.SIZES)}.")
    _check_folders(arguments)
    stop = float("inf") if arguments.stop_after is None else arguments.stop_after
    print(planner.run(quick=arguments.quick, path=arguments.json, sizes=sizes, stop_after=stop))
