"""The grad_norm cases under pytest-benchmark: `pytest bench/bench_grad_norm.py`."""


def test_grad_norm(measure):
    measure()
