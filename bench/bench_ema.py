"""The ema cases under pytest-benchmark: `pytest bench/bench_ema.py`."""


def test_ema(measure):
    measure()
