"""softmax and log_softmax down columns: values, derivatives and determinism of a CPU's own kernel."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FLOATS, assert_accurate
from softmax_cases import leaves, normal
from torch.testing import assert_close

import bigmodel
from bigmodel import _memory

NAMES = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
# Strips that are whole, narrow and of a step and a rest; many columns of few elements; several blocks of rows.
SHAPES = [((9, 64), 0), ((2, 7, 131), 1), ((3, 5, 4, 5), 1), ((1, 1, 40), 1), ((3, 5000), 0), ((20_000, 33), 0)]


@NAMES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values_and_gradients(isa, name, dtype, shape, dim):
    ours, stock = getattr(bigmodel, name), getattr(torch, name)
    x = normal(*shape, dtype=dtype)
    a, b, double = leaves(x, x, x.double())
    grad = normal(*shape, dtype=dtype, spread=1)
    out, other = ours(a, dim), stock(b, dim)
    rows = stock(double.movedim(dim, -1).contiguous(), -1).movedim(-1, dim)
    assert out.is_contiguous()
    assert_accurate(out, other, rows.detach(), strict=out.numel() > 1e5)
    out.backward(grad), other.backward(grad), rows.backward(grad.double())
    assert_accurate(a.grad, b.grad, double.grad, "gradient", strict=out.numel() > 1e5)


@NAMES
def test_special_values_follow_stock(isa, name):
    ours, stock = getattr(bigmodel, name), getattr(torch, name)
    x = normal(9000, 40)
    x[3, 0], x[8999, 1], x[5, 2], x[:, 3], x[:, 4], x[:8500, 5] = (
        math.nan, math.inf, -math.inf, -math.inf, math.nan, -math.inf
    )  # fmt: skip
    assert_close(ours(x, 0), stock(x, 0), equal_nan=True)
    tall = torch.full((40_000, 16), -math.inf)  # the longest block has 32768 rows
    tall[39_000:] = -500.0
    assert_close(ours(tall, 0), stock(tall, 0))


@NAMES
def test_bits_depend_on_a_column_alone(name):
    """Not on the threads, the other columns or the memory, which is stored past the caches when it is large."""
    ours = getattr(bigmodel, name)
    x, grad = normal(300, 40_000), normal(300, 40_000)
    whole, few = x.clone().requires_grad_(), x[:, 100:150].clone().requires_grad_()
    assert ours(whole, 0).isfinite().all()  # 48 MB, in memory that the next call finds there
    out = ours(whole, 0)
    out.backward(grad)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        part = ours(few, 0)
        part.backward(grad[:, 100:150])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(part, out[:, 100:150]) and torch.equal(few.grad, whole.grad[:, 100:150])


@NAMES
def test_second_derivatives_and_kept_memory(name, monkeypatch):
    """A result that died is where the next one is written; gradients of any strides."""
    monkeypatch.setattr(_memory, "LARGE", 1 << 10)
    ours, stock = getattr(bigmodel, name), getattr(torch, name)
    for shape, dim in (((40, 30), 0), ((4, 9, 5, 7), 1), ((3, 8, 200), -2)):
        grads = []
        for function in (ours, stock):
            torch.manual_seed(0)
            x, grad = normal(*shape, dtype=torch.float64).requires_grad_(), normal(*shape, dtype=torch.float64)
            out = function(x.mT.contiguous().mT, dim)
            (first,) = torch.autograd.grad(out, x, grad.mT.contiguous().mT, retain_graph=True)
            (again,) = torch.autograd.grad(out, x, grad, create_graph=True)
            (second,) = torch.autograd.grad(again.square().sum(), x)
            grads.append((out, first, again, second))
        assert_close(*grads)
    x = normal(64, 64)
    where = ours(x, 0).data_ptr()
    assert ours(x, 0).data_ptr() == where
