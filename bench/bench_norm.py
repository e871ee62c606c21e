"""The norm cases under pytest-benchmark: `pytest bench/bench_norm.py`."""


def test_norm(measure):
    measure()
