"""The normalisation ops: values and gradients against float64, over dtypes, sizes and options."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ATOL, FLOATS, assert_accurate
from norm_cases import LOW, MIXES, RESIDUAL_MIXES, compare, exact_norm, leaves, make, our_norm, stock_norm
from torch.testing import assert_close

import bigmodel


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(d)[6:] for d in mix))
@pytest.mark.parametrize("size", [(3, 64), (5, 37), (33, 768), (2, 4099)], ids=str)
def test_values_and_gradients(device, isa, centred, dtypes, size):
    input_dtype, weight_dtype, out_dtype = dtypes
    x, weight, bias = make(*size, input_dtype, weight_dtype, device, bias=centred)
    compare(centred, x, (size[1],), weight, bias, out_dtype=out_dtype)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_error_is_no_more_than_stocks(device, isa, centred, dtype):
    """The second accuracy rule to the letter, where there are enough rows for it to mean something."""
    x, weight, bias = make(2048, 520, dtype, torch.float32, device, bias=centred)
    compare(centred, x, (520,), weight, bias, strict=True)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 63, 65, 127, 1000, 4095, 4096, 4097, 8192, 20000, 70001])
def test_any_row_length(device, centred, cols):
    x, weight, bias = make(3, cols, device=device, bias=centred)
    compare(centred, x, (cols,), weight, bias)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 1023, 1025])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_any_row_count(device, centred, rows):
    x, weight, bias = make(rows, 96, torch.bfloat16, torch.float32, device, bias=centred)
    compare(centred, x, (96,), weight, bias)


@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
def test_affine_parts(device, affine):
    x, weight, bias = make(6, 40, device=device)
    weight = weight if affine in ("weight", "both") else None
    bias = bias if affine in ("bias", "both") else None
    compare(True, x, (40,), weight, bias)
    if bias is None:
        compare(False, x, (40,), weight, None)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_several_normalised_dimensions(device, centred):
    x = torch.randn(4, 3, 5, 7, device=device)
    weight, bias = torch.randn(3, 5, 7, device=device), torch.randn(3, 5, 7, device=device)
    compare(centred, x, (3, 5, 7), weight, bias if centred else None)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_rows_far_from_zero(device, centred):
    """The variance of a row of mean 1000 must not be lost to cancellation."""
    x, weight, bias = make(4, 3000, device=device, bias=centred)
    compare(centred, x + 1000, (3000,), weight, bias)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_offset_is_added_in_float32(device, centred, dtype):
    x, weight, bias = make(9, 128, dtype, device=device, bias=centred)
    compare(centred, x, (128,), weight * 0.01, bias, offset=1.0)
    # In bfloat16 1 + 0.0039 is 1: the offset would be lost.
    small = torch.full((128,), 0.00389, dtype=torch.bfloat16, device=device)
    ones = torch.full((1, 128), 1.0, device=device)
    out = bigmodel.rms_norm(ones, 128, small, 0.0, weight_offset=1.0)
    assert_close(out, ones * (1 + small.float()))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_memory_efficient_gradients(device, centred, dtypes, offset):
    x, weight, bias = make(17, 200, *dtypes, device, bias=centred)
    weight = weight.abs() + 0.5
    ours, stocks = leaves(x, weight, bias), leaves(x, weight, bias)
    out = our_norm(centred, ours[0], (200,), *ours[1:], 1e-5, offset, memory_efficient=True)
    stock = stock_norm(centred, stocks[0], (200,), *stocks[1:], 1e-5, offset)
    grad = torch.randn_like(x)
    out.backward(grad), stock.backward(grad)
    for our, other in zip(ours, stocks, strict=True):
        if our is not None:
            assert_close(our.grad, other.grad, rtol=1e-4 if x.dtype is torch.float32 else 1e-9, atol=2e-5)


def test_memory_efficient_keeps_the_output_and_not_the_input(device):
    x, weight, _ = make(4, 64, device=device)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = bigmodel.rms_norm(x, 64, weight, memory_efficient=True)
        assert out.data_ptr() in kept and x.data_ptr() not in kept
        kept.clear()
        out = bigmodel.rms_norm(x, 64, weight)
        assert out.data_ptr() not in kept and x.data_ptr() in kept


def test_memory_efficient_with_a_zero_weight_is_finite(device):
    x, weight, _ = make(4, 64, device=device)
    weight[3] = 0
    x.requires_grad_()
    bigmodel.rms_norm(x, 64, weight, memory_efficient=True).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtypes", RESIDUAL_MIXES, ids=lambda mix: "-".join(str(d)[-7:] for d in mix))
@pytest.mark.parametrize("cols", [96, 4099])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_add_norm(device, centred, dtypes, cols, memory_efficient):
    input_dtype, residual_dtype, wanted = dtypes
    summed_dtype = wanted or torch.promote_types(input_dtype, residual_dtype)
    coarsest = max((input_dtype, residual_dtype, summed_dtype), key=ATOL.get)
    x, weight, bias = make(11, cols, input_dtype, torch.float32, device, bias=centred)
    weight = weight.abs() + 0.5
    residual = torch.randn(11, cols, dtype=torch.float64).to(device, residual_dtype)

    def run(kind):
        # Everyone normalises the same rounded sum, so float64 is a reference for what follows it.
        convert = (lambda t: t.double()) if kind == "exact" else lambda t: t
        a, r, w, b = leaves(*(None if t is None else convert(t) for t in (x, residual, weight, bias)))
        if kind == "ours":
            function = bigmodel.add_layer_norm if centred else bigmodel.add_rms_norm
            affine = (w, b) if centred else (w,)
            out, summed = function(a, r, cols, *affine, 1e-5, residual_dtype=wanted, memory_efficient=memory_efficient)
        else:
            rounded = (x.double() + residual.double()).to(summed_dtype)
            summed = a.to(torch.float64) + r.to(torch.float64)
            summed = (summed + (rounded.double() - summed).detach()).to(
                torch.float64 if kind == "exact" else summed_dtype
            )
            norm = exact_norm if kind == "exact" else stock_norm
            out = norm(centred, summed, (cols,), w, b, 1e-5)
            out = out if kind == "exact" else out.to(input_dtype)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(11, cols, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
        grads = [grads[0].to(input_dtype).to(out.dtype), grads[1].to(summed_dtype).to(summed.dtype)]
        torch.autograd.backward([out, summed], grads)
        return out, summed, a, r, w, b

    ours, stock, exact = run("ours"), run("stock"), run("exact")
    assert ours[0].dtype is input_dtype and ours[1].dtype is summed_dtype
    assert torch.equal(ours[1], (x.double() + residual.double()).to(summed_dtype))
    assert_accurate(ours[0], stock[0], exact[0].detach(), "normed")
    for name, our, other, double in zip(
        ("input", "residual", "weight", "bias"), ours[2:], stock[2:], exact[2:], strict=True
    ):
        if our is None:
            continue
        assert our.grad.dtype is our.dtype
        if memory_efficient:
            scale = double.grad.abs().max()
            assert (our.grad.double() - double.grad).abs().max() <= 8 * ATOL[coarsest] * scale + 1e-5 * scale, name
        else:
            assert_accurate(
                our.grad, other.grad, double.grad, name, dtype=coarsest if our.grad.dtype is not coarsest else None
            )


def test_add_norm_with_one_output_unused(device):
    x, weight, _ = make(5, 64, device=device)
    for used in (0, 1):
        a, r, w = leaves(x, x.flip(0), weight)
        bigmodel.add_rms_norm(a, r, 64, w)[used].square().sum().backward()
        b, s, v = leaves(x, x.flip(0), weight)
        (F.rms_norm(b + s, (64,), v, torch.finfo(torch.float32).eps), b + s)[used].square().sum().backward()
        assert_close(a.grad, b.grad), assert_close(r.grad, s.grad)
        assert_close(w.grad if used == 0 else None, v.grad) if used == 0 else None


def test_special_values_follow_stock(device):
    x = torch.randn(5, 64, device=device)
    x[0, 3], x[1, 3], x[2] = float("nan"), float("inf"), 0
    assert_close(bigmodel.layer_norm(x, 64), F.layer_norm(x, (64,)), equal_nan=True)
    assert_close(bigmodel.rms_norm(x, 64), F.rms_norm(x, (64,)), equal_nan=True)


def test_rounding_to_low_precision_is_to_nearest_even(device, isa):
    """With rows of ones the result is the weight itself, rounded as by torch's own conversion, bit for bit."""
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32).to(device)
    values = torch.cat([values, torch.tensor([65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 3e-8, 6.1e-5], device=device)])
    values = values[~values.isnan()]
    ones = torch.ones(1, values.numel(), device=device)
    for dtype in LOW:
        out = bigmodel.rms_norm(ones, values.numel(), values, 0.0, out_dtype=dtype)
        assert torch.equal(out[0], values.to(dtype))
        low = values.to(dtype)
        assert torch.equal(bigmodel.rms_norm(ones, low.numel(), low, 0.0)[0], low.float())


# --- defaults ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
def test_default_eps(device, dtype):
    x = torch.full((1, 32), 1e-4, dtype=dtype, device=device)
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    expected = (x.double() / (x.double().square().mean() + eps).sqrt()).to(dtype)
    assert_close(bigmodel.rms_norm(x, 32), expected)


def test_result_dtypes(device):
    x = torch.randn(2, 8, device=device)
    for a, b in itertools.product(FLOATS, FLOATS):
        assert bigmodel.rms_norm(x.to(a), 8).dtype is a
        assert bigmodel.rms_norm(x.to(a), 8, out_dtype=b).dtype is b
        normed, summed = bigmodel.add_rms_norm(x.to(a), x.to(b), 8)
        assert normed.dtype is a and summed.dtype is torch.promote_types(a, b)
