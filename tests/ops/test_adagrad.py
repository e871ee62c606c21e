"""The Adagrad op against its formulas in float64 (tests/ops/update_formulas.py), and torch.optim.Adagrad."""

from __future__ import annotations

import pytest
import torch
import update_formulas as reference
from conftest import assert_accurate
from test_sgd import SIZES, draw

from bigmodel.ops import adagrad_
from bigmodel.ops._table import TableCache


def lists_of(dtype, device):
    sums = [t.square() for t in draw(dtype, device, 3)]
    return [
        draw(dtype, device, 1),
        draw(dtype, device, 2),
        sums,
        [torch.tensor(float(i), device=device) for i in range(len(SIZES))],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_values(device, isa, dtype, maximize):
    lists = lists_of(dtype, device)
    exact, stock = (
        [[t.to(d, copy=True) if t.dim() else t.clone() for t in part] for part in lists] for d in (torch.float64, dtype)
    )
    factor = torch.tensor(0.5, dtype=torch.float64, device=device)
    for other in (exact, stock):
        reference.adagrad(*other, None, factor, None, None, 0.1, 0.2, 0.01, 1e-6, maximize)
    adagrad_(*lists, lr=0.1, lr_decay=0.2, weight_decay=0.01, eps=1e-6, maximize=maximize, grad_factor=factor)
    for part in (0, 2, 3):
        for ours, theirs, want in zip(lists[part], stock[part], exact[part], strict=True):
            assert_accurate(ours.cpu(), theirs.cpu(), want.cpu().double())


def test_steps_as_torch_optim(device):
    params = draw(torch.float32, device, 1)
    stock = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adagrad(stock, lr=0.1, lr_decay=0.1, weight_decay=0.02, initial_accumulator_value=0.3)
    sums, steps = [torch.full_like(p, 0.3) for p in params], [torch.zeros((), device=device) for _ in params]
    cache = TableCache()
    for step in range(5):
        grads = draw(torch.float32, device, 10 + step)
        for p, g in zip(stock, grads, strict=True):
            p.grad = g
        optimizer.step()
        adagrad_(params, grads, sums, steps, lr=0.1, lr_decay=0.1, weight_decay=0.02, cache=cache)
    for ours, theirs in zip(params, stock, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_found_inf_moves_nothing(device):
    lists = lists_of(torch.float32, device)
    before = [t.clone() for part in lists for t in part]
    adagrad_(*lists, lr=0.1, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip([t for part in lists for t in part], before, strict=True))
