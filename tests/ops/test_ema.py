"""Moving averages against float64."""

from __future__ import annotations

import pytest
import torch
import update_formulas as reference
from conftest import FLOATS, assert_accurate
from test_sgd import draw

from bigmodel.ops import ema_


@pytest.mark.parametrize("value_dtype", FLOATS)
@pytest.mark.parametrize("average_dtype", FLOATS)
def test_values(device, isa, average_dtype, value_dtype):
    averages, values = draw(average_dtype, device, 1), draw(value_dtype, device, 2)
    exact, stock = ([a.to(d, copy=True) for a in averages] for d in (torch.float64, average_dtype))
    for other in (exact, stock):
        reference.ema(other, values, 0.9)
    ema_(averages, values, 0.9)
    for ours, theirs, want in zip(averages, stock, exact, strict=True):
        assert_accurate(ours.cpu(), theirs.cpu(), want.cpu())


def test_decay_of_zero_and_one(device):
    averages, values = draw(torch.float32, device, 1), draw(torch.float32, device, 2)
    before = [a.clone() for a in averages]
    ema_(averages, values, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    ema_(averages, values, 0.0)
    for a, v in zip(averages, values, strict=True):
        torch.testing.assert_close(a, v, rtol=0, atol=5e-7)


def test_it_is_what_the_adam_op_does(device):
    """For float32 weights the average inside a step and the one after it have the same bits."""
    from test_adam import Group

    inside = Group(device=device, ema=True)
    after = inside.copy()
    averages, after.emas = after.emas, []
    inside.step(ema_decay=0.9)
    after.step()
    ema_(averages, after.params, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(inside.emas, averages, strict=True))
