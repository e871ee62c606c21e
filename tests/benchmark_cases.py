"""What the tests of the benchmark share: measurements and a report that nobody measured."""

from bigmodel import info
from bigmodel.benchmarks import report
from bigmodel.benchmarks.harness import COPY, OURS, Measurement, Timing

SMALL = (6, 33)


def timing(median):
    return Timing(median, median * 0.9, median * 1.1, samples=7, calls=1)


def measurement(case="op forward float32 8x16", times=None, notes=None, sweep=False, shape=(8, 16)):
    times = times or {OURS: 1e-3, "stock": 4e-3, COPY: 0.5e-3}
    times = {name: timing(median) for name, median in times.items()}
    return Measurement(case, "op", "forward", "float32", shape, 1_000_000, sweep, times, notes or {})


def make_report(measurements, verdicts=()):
    facts = info.collect()
    return report.Report("norm", "cpu", True, "2030-01-01T00:00:00+00:00", None, facts, measurements, list(verdicts))
