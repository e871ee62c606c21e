"""A pytest plugin: journals every test, leaves out those that the journal knows, and takes one shard of the rest.

BIGMODEL_JOURNAL names the file, BIGMODEL_SHARD "1/4" the second of four shards. A test whose module is missing here is
left out, with its name. After an error that breaks the CUDA context the process ends, for another to go on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from bigmodel.benchmarks.journal import Journal

CONTEXT_LOST = 3


class Plugin:
    def __init__(self, journal: Journal, shard: int, shards: int):
        self.journal, self.shard, self.shards = journal, shard, shards
        self.outcome: dict[str, object] = {}
        self.lost = False

    def pytest_collectreport(self, report):
        if report.failed and self.shard == 0:
            self.journal.error(f"{report.nodeid} (not collected)", str(report.longrepr).strip().splitlines()[-1])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        mine = items[self.shard :: self.shards]
        left = set(self.journal.plan(item.nodeid for item in mine))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in left])
        items[:] = [item for item in mine if item.nodeid in left]

    def pytest_runtest_logstart(self, nodeid):
        self.outcome = {"outcome": "passed"}
        self.started = time.monotonic()
        self.journal.begin(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        error = call.excinfo.value if call.excinfo is not None else None
        if report.failed and isinstance(error, ModuleNotFoundError):
            self.outcome = {"outcome": "left out", "why": str(error)}
        elif report.failed:
            self.outcome = {"outcome": "failed", "why": str(report.longrepr)[-4000:]}
            self.lost |= _context_lost()
        elif report.skipped and self.outcome["outcome"] == "passed":
            self.outcome = {"outcome": "skipped", "why": str(report.longrepr[-1])}
        return report

    def pytest_runtest_logfinish(self, nodeid):
        self.journal.end(nodeid, seconds=round(time.monotonic() - self.started, 3), **self.outcome)
        if self.lost:
            pytest.exit("the CUDA context is lost", returncode=CONTEXT_LOST)


def _context_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config):
    shard, shards = map(int, os.environ.get("BIGMODEL_SHARD", "0/1").split("/"))
    config.pluginmanager.register(Plugin(Journal(Path(os.environ["BIGMODEL_JOURNAL"])), shard, shards))
