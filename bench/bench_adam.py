"""The adam cases under pytest-benchmark: `pytest bench/bench_adam.py`."""


def test_adam(measure):
    measure()
