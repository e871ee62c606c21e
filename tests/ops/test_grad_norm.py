"""The norm of many gradients and clipping by it, against float64 and torch.nn.utils."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FLOATS
from large import LARGE, need_gib
from test_adam import shifted

from bigmodel.ops import grad_clip, grad_scale_, grad_total

SIZES = [(1,), (0,), (63, 65), (16384,), (16385,), (50_000,)]


def draw(dtype, device, scale=1.0):
    return [(torch.randn(size) * scale).to(dtype).to(device) for size in SIZES]


def exact_total(grads, norm_type):
    values = torch.cat([g.double().flatten().cpu() for g in grads]).abs()
    return values.max() if norm_type == math.inf else (values**norm_type).sum()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", [1, 2.0, math.inf])
def test_total(device, isa, dtype, norm_type):
    grads = draw(dtype, device)
    total = grad_total(grads, norm_type)
    assert total.dtype is torch.float64 and total.shape == ()
    # 64 float32 terms to a number: half an ulp each, and random; the sum over numbers is in float64
    torch.testing.assert_close(total.cpu(), exact_total(grads, norm_type), rtol=1e-6, atol=0)


def test_rows_of_different_dtypes(device):
    grads = [g for dtype in FLOATS for g in draw(dtype, device)]
    torch.testing.assert_close(grad_total(grads).cpu(), exact_total(grads, 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_show(device, isa, norm_type, bad):
    grads = draw(torch.float32, device)
    grads[3][777] = bad
    total = grad_total(grads, norm_type)
    assert total.isnan() if math.isnan(bad) else total == math.inf


def test_bits_depend_on_neither_threads_nor_alignment(device):
    grads = [*draw(torch.float32, device), torch.randn(300_000, device=device)]
    before, totals = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            totals.append(grad_total(grads))
    finally:
        torch.set_num_threads(before)
    totals.append(grad_total([shifted(g) for g in grads]))
    assert all(torch.equal(total, totals[0]) for total in totals)


@LARGE
def test_beyond_2_to_31_elements(device):
    """Only what the index reaches past 2^31 counts. A CPU's memory that was never written is zeros and takes none."""
    if device == "cuda":
        need_gib(device, 5)
    grad = (torch.empty if device == "cpu" else torch.zeros)(2**31 + 20_000, dtype=torch.bfloat16, device=device)
    if grad.flatten()[0] != 0:
        pytest.skip("the allocator gives used memory")
    grad[-1], grad[2**31] = 3.0, 4.0
    assert grad_total([grad]) == 25 and grad_total([grad], math.inf) == 4


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_as_torch(device, max_norm, norm_type):
    grads = draw(torch.float32, device)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_([p for p in params if p.numel()], max_norm, norm_type)
    norm, factor, skip = grad_clip(grad_total(grads, norm_type), max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    versions = [g._version for g in grads]
    grad_scale_(grads, factor)
    assert skip == 0 and all(g._version > v for g, v in zip(grads, versions, strict=True))
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(g, p.grad)


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def test_scale_and_skipping(device):
    total = torch.tensor(64.0, dtype=torch.float64, device=device)
    skipped = scalar(2.0, device)
    norm, factor, skip = grad_clip(total, 1.0, grad_scale=scalar(4.0, device), skip_nonfinite=True, skipped=skipped)
    assert (norm, skip, skipped) == (2, 0, 2) and math.isclose(factor, 1 / (2 + 1e-6), rel_tol=1e-15)
    *_, skip = grad_clip(total, 1.0, found_inf=scalar(1.0, device), skipped=skipped)
    assert (skip, skipped) == (1, 3)
    for bad in (math.inf, math.nan):
        broken = torch.full_like(total, bad)
        assert grad_clip(broken, 1.0, skip_nonfinite=True, skipped=skipped).skip == 1
        assert grad_clip(broken, 1.0).skip == 0
    assert skipped == 5
    assert grad_clip(total, 1.0, norm_dtype=torch.float64).norm.dtype is torch.float64


@pytest.mark.parametrize("dtype", FLOATS)
def test_scaling(device, isa, dtype):
    grads = draw(dtype, device)
    expected = [(g.double() * 0.375).to(dtype) for g in grads]
    grad_scale_(grads, scalar(0.375, device).double())
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_errors():
    with pytest.raises(ValueError, match="grad_total: grads is empty"):
        grad_total([])
    with pytest.raises(ValueError, match="grad_total: norm_type is 3; supported are 1, 2 and inf"):
        grad_total([torch.ones(2)], 3)
    with pytest.raises(TypeError, match=r"grad_total: grads\[1\] has dtype torch.int64"):
        grad_total([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="grad_clip: total is torch.float32"):
        grad_clip(torch.ones(()), 1.0)
    with pytest.raises(ValueError, match="grad_clip: found_inf is torch.float64"):
        grad_clip(torch.ones((), dtype=torch.float64), 1.0, found_inf=torch.ones((), dtype=torch.float64))
