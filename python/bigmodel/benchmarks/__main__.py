"""Measures one group in this process: `run.measure_in_process` starts it with the environment to be measured in."""

import argparse
import json
from pathlib import Path

from bigmodel.benchmarks.run import measure_group

parser = argparse.ArgumentParser(prog="python -m bigmodel.benchmarks", description=__doc__)
parser.add_argument("group")
parser.add_argument("--device", required=True)
parser.add_argument("--pages", required=True, help="shown beside the progress bar")
parser.add_argument("--quick", action="store_true")
parser.add_argument("--sweep", action="store_true")
parser.add_argument("--out", required=True, type=Path)
arguments = parser.parse_args()
rows = measure_group(
    arguments.group, arguments.device, quick=arguments.quick, sweep=arguments.sweep, label=arguments.pages
)
arguments.out.write_text(json.dumps([row.to_dict() for row in rows]))
