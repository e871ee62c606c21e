"""Measures groups in this process, into a journal: `run` starts it with the environment to be measured in."""

import argparse
from pathlib import Path

from bigmodel.benchmarks.journal import Journal
from bigmodel.benchmarks.run import measure_groups

parser = argparse.ArgumentParser(prog="python -m bigmodel.benchmarks", description=__doc__)
parser.add_argument("groups", nargs="+")
parser.add_argument("--device", required=True)
parser.add_argument("--pages", required=True, help="shown beside the progress bar")
parser.add_argument("--quick", action="store_true")
parser.add_argument("--sweep", action="store_true")
parser.add_argument("--seconds", type=float, help="begin no case after them")
parser.add_argument("--journal", required=True, type=Path)
arguments = parser.parse_args()
measure_groups(
    arguments.groups,
    arguments.device,
    Journal(arguments.journal),
    quick=arguments.quick,
    sweep=arguments.sweep,
    seconds=arguments.seconds,
    label=arguments.pages,
)
