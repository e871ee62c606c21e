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
    command.add_argument("group", nargs="?", choices=(*GROUPS, "plan"), help="which ops, or the planner's gaps")
    command.add_argument(
        "--throughput",
        action="store_true",
        help="tokens/s of a training step on this machine, as `bigmodel plan` reads it",
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is usable")
    command.add_argument("--quick", action="store_true", help="few cases, few rounds: under a minute, rough figures")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="measure a range of row lengths too and draw the bandwidth here"
    )
    command.add_argument("--size", nargs="+", metavar="JOBSxPOOLSxSLOTS", help="plan: these sizes alone")
    command.add_argument(
        "--stop-after",
        type=float,
        metavar="S",
        help="plan: begin no measurement after so many seconds; the same command goes on with the file of --json",
    )
    command.set_defaults(action=_bench)

    from bigmodel.schedule import command as planner

    planner.add_to(commands)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    from bigmodel import info

    facts = info.collect()
    print(json.dumps(facts, indent=1) if arguments.json else info.render(facts))


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.throughput:
        return _throughput(arguments)
    if arguments.group is None:
        raise ValueError("which benchmark? Name a group, or give --throughput.")
    if arguments.group == "plan":
        return _bench_plan(arguments)
    if arguments.size is not None or arguments.stop_after is not None:
        raise ValueError("--size and --stop-after go with plan.")
    from bigmodel.benchmarks import plot, run

    for path in (arguments.json, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist.")
    if arguments.plot is not None:
        plot.require_matplotlib()
    report = run.run(arguments.group, device=arguments.device, quick=arguments.quick, sweep=arguments.plot is not None)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    print(report.to_markdown(), end="")
    if arguments.plot is not None:
        plot.save(report, arguments.plot)


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
    sizes = arguments.size or planner.SIZES
    for size in sizes:
        if size not in planner.SIZES:
            raise ValueError(f"--size {size} is none of {', '.join(planner.SIZES)}.")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"the folder of {arguments.json} does not exist.")
    stop = float("inf") if arguments.stop_after is None else arguments.stop_after
    print(planner.run(quick=arguments.quick, path=arguments.json, sizes=sizes, stop_after=stop))
