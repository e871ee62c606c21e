"""The adagrad cases under pytest-benchmark: `pytest bench/bench_adagrad.py`."""


def test_adagrad(measure):
    measure()
