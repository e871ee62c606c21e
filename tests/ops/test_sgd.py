"""The SGD op against torch.optim.SGD's formulas in float64 (tests/ops/update_formulas.py), and torch.optim itself."""

from __future__ import annotations

import math

import pytest
import torch
import update_formulas as reference
from conftest import assert_accurate

from bigmodel.ops import sgd_
from bigmodel.ops._table import TableCache

SIZES = [(1,), (0,), (7, 9), (2049,), (5000,)]


def draw(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype).to(device) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum, dampening, nesterov", [(0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)])
@pytest.mark.parametrize("maximize", [False, True])
def test_values(device, isa, dtype, momentum, dampening, nesterov, maximize):
    lists = [draw(dtype, device, 1), draw(dtype, device, 2), draw(dtype, device, 3) if momentum else []]
    lists.append([torch.tensor(float(i % 2), device=device) for i in range(len(SIZES))] if dampening else [])
    control = [torch.tensor(value, device=device) for value in (0.5, 4.0, 0.0)]
    control[0] = control[0].double()
    numbers = (0.1, momentum, dampening, 0.01, nesterov, maximize)
    exact, stock = ([[t.to(d, copy=True) for t in part] for part in lists] for d in (torch.float64, dtype))
    for other in (exact, stock):
        reference.sgd(*other, None, *control, *numbers)
    sgd_(
        *lists, lr=0.1, momentum=momentum, dampening=dampening, weight_decay=0.01, nesterov=nesterov,
        maximize=maximize, grad_factor=control[0], grad_scale=control[1], found_inf=control[2],
    )  # fmt: skip
    for part in (0, 2):
        for ours, theirs, want in zip(lists[part], stock[part], exact[part], strict=True):
            assert_accurate(ours.cpu(), theirs.cpu(), want.cpu())
    assert all(begun == 1 for begun in lists[3])


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "dampening": 0.4}, {"momentum": 0.9, "nesterov": True}], ids=str
)
def test_steps_as_torch_optim(device, options):
    """From no buffers, which torch starts as the first gradient."""
    params, buffers = (
        draw(torch.float32, device, 1),
        [torch.full_like(p, math.nan) for p in draw(torch.float32, device, 1)],
    )
    if not options.get("dampening"):
        buffers = [b.zero_() for b in buffers]
    begun = [torch.zeros((), device=device) for _ in params] if options.get("dampening") else []
    stock = [p.clone().requires_grad_() for p in params]
    optimizer, cache = torch.optim.SGD(stock, lr=0.1, weight_decay=0.02, **options), TableCache()
    for step in range(5):
        grads = draw(torch.float32, device, 10 + step)
        for p, g in zip(stock, grads, strict=True):
            p.grad = g
        optimizer.step()
        sgd_(params, grads, buffers if options else [], begun, lr=0.1, weight_decay=0.02, cache=cache, **options)
    for ours, theirs in zip(params, stock, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_found_inf_moves_nothing(device):
    lists = [draw(torch.float32, device, seed) for seed in (1, 2, 3)]
    begun = [torch.zeros((), device=device) for _ in SIZES]
    before = [t.clone() for part in (*lists, begun) for t in part]
    sgd_(*lists, begun, lr=0.1, momentum=0.9, dampening=0.1, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip([t for part in (*lists, begun) for t in part], before, strict=True))


def test_momentum_needs_its_buffers():
    params = [torch.zeros(3)]
    with pytest.raises(ValueError, match="sgd_: momentum is 0.9, but 0 momentum_buffers came"):
        sgd_(params, params, lr=0.1, momentum=0.9)
