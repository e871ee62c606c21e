"""The sgd cases under pytest-benchmark: `pytest bench/bench_sgd.py`."""


def test_sgd(measure):
    measure()
