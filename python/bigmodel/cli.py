"""The `bigmodel` command: arguments in, one call, text out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; an error is one sentence on stderr and status 1."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments) or 0
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

    command = commands.add_parser("bench", help="time the ops against stock torch, torch.compile and a copy")
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
    command.add_argument("--seconds", type=float, help="begin no case after them; what is left is named")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    command.add_argument("--report", type=Path, metavar="FILE.html", help="write one self-contained page here")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="measure a range of row lengths too and draw the bandwidth here"
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

    if arguments.all and arguments.group is not None:
        raise ValueError(f"--all measures {', '.join(run.ALL)}; it takes no group.")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise ValueError(f"--seconds is {arguments.seconds:g}, it must be positive.")
    for path in (arguments.json, arguments.plot, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist.")
    if arguments.plot is not None:
        plot.require_matplotlib()
    overview = arguments.group is None and not arguments.all
    if overview and arguments.plot is not None:
        raise ValueError("--plot draws row lengths: name a group, or give --all.")
    reports = run.run_groups(
        GROUPS if overview else run.ALL if arguments.all else [arguments.group],
        device=arguments.device,
        quick=arguments.quick or overview,
        sweep=arguments.plot is not None or arguments.all,
        seconds=run.OVERVIEW_SECONDS if overview and arguments.seconds is None else arguments.seconds,
    )
    if arguments.json is not None:
        arguments.json.write_text(report.to_json(reports))
    print(report.overview(reports) if overview else report.to_markdown(reports), end="")
    if arguments.report is not None:
        arguments.report.write_text(page.to_html(reports), encoding="utf-8")
    if arguments.plot is not None:
        for each in reports:
            plot.save(each, arguments.plot if len(reports) == 1 else plot.path_of(arguments.plot, each.group))
    return 1 if any(each.failed for each in reports) else None


def _compare(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import compare

    if arguments.group is not None or arguments.all:
        raise ValueError("--compare takes two files, and neither a group nor --all.")
    print(compare.to_markdown(*map(compare.load, arguments.compare)), end="")


def _throughput(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import throughput

    if arguments.group is not None or arguments.plot is not None:
        raise ValueError("--throughput takes no group and no --plot.")
    points = throughput.measure(arguments.device, quick=arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"throughput": points}, indent=1) + "\n")
    print(throughput.to_toml(points), end="")


def _bench_plan(arguments: argparse.Namespace) -> None:
    from bigmodel.benchmarks import planner

    if arguments.device is not None or arguments.plot is not None:
        raise ValueError("plan takes no --device and no --plot.")
    print(planner.run(quick=arguments.quick, path=arguments.json))
