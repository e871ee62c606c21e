"""The softmax cases under pytest-benchmark: `pytest bench/bench_softmax.py`."""


def test_softmax(measure):
    measure()
