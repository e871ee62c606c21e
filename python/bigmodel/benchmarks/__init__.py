"""Benchmarks that ship with the package: `bigmodel bench GROUP`, or `run(GROUP)` from Python.

A group is a module of this package named in GROUPS. It has `cases(device, quick=, sweep=)`, a list of harness.Case, and
`goals(device)`, a list of goals.Goal; everything else is shared.
"""

from importlib import import_module
from types import ModuleType

GROUPS = ("norm", "softmax", "attention", "adam", "sgd", "adagrad", "ema", "grad_norm")


def load_group(name: str) -> ModuleType:
    """The module of a group; ValueError naming the known ones for any other name."""
    if name not in GROUPS:
        raise ValueError(f"bench: group is {name!r}, known are {', '.join(GROUPS)}.")
    return import_module(f"bigmodel.benchmarks.{name}")
