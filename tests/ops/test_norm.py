"""The normalisation ops: values and gradients, shapes and layouts, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ATOL, FLOATS, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import bigmodel

LOW = [torch.bfloat16, torch.float16]
# input, weight, out
MIXES = [
    *((d, d, d) for d in FLOATS),
    *((low, torch.float32, low) for low in LOW),
    *((low, torch.float32, torch.float32) for low in LOW),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.float64, torch.bfloat16),
]


def exact_norm(centred, x, shape, weight, bias, eps, offset=0.0):
    """The definition, in the dtype it is given."""
    axes = tuple(range(-len(shape), 0))
    if centred:
        x = x - x.mean(axes, keepdim=True)
    out = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    if weight is not None:
        out = out * (weight + offset)
    return out if bias is None else out + bias


def stock_norm(centred, x, shape, weight, bias, eps, offset=0.0):
    """torch's own op in float32 arithmetic (float64 for float64), for any mix of dtypes."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    x, weight, bias = (None if t is None else t.to(wide) for t in (x, weight, bias))
    weight = weight + offset if weight is not None else None
    return F.layer_norm(x, shape, weight, bias, eps) if centred else F.rms_norm(x, shape, weight, eps)


def our_norm(centred, x, shape, weight, bias, eps, offset=0.0, **options):
    if centred:
        return bigmodel.layer_norm(x, shape, weight, bias, eps, weight_offset=offset, **options)
    return bigmodel.rms_norm(x, shape, weight, eps, weight_offset=offset, **options)


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def compare(centred, x, shape, weight, bias, eps=1e-5, offset=0.0, out_dtype=None, strict=False):
    """Our values and gradients against float64, with stock as the yardstick."""
    out_dtype = out_dtype or x.dtype
    grad = torch.randn(x.shape, device=x.device, dtype=torch.float64).to(out_dtype)
    doubles = leaves(*(None if t is None else t.double() for t in (x, weight, bias)))
    exact = exact_norm(centred, doubles[0], shape, *doubles[1:], eps, offset)
    stocks, ours = leaves(x, weight, bias), leaves(x, weight, bias)
    stock = stock_norm(centred, stocks[0], shape, *stocks[1:], eps, offset).to(out_dtype)
    out = our_norm(centred, ours[0], shape, *ours[1:], eps, offset, out_dtype=out_dtype)
    assert out.dtype is out_dtype and out.is_contiguous()
    assert_accurate(out, stock, exact.detach(), "out", strict=strict)
    for tensor, gradient in ((exact, grad.double()), (stock, grad), (out, grad)):
        tensor.backward(gradient)
    for name, our, stock_leaf, double in zip(("input", "weight", "bias"), ours, stocks, doubles, strict=True):
        if double is not None:
            assert our.grad.dtype is our.dtype
            assert_accurate(our.grad, stock_leaf.grad, double.grad, f"grad of {name}", strict=strict)


def make(rows, cols, dtype=torch.float32, weight_dtype=None, device="cpu", bias=True):
    shape = (*rows, cols) if isinstance(rows, tuple) else (rows, cols)
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    weight = (torch.randn(cols, dtype=torch.float64) + 0.5).to(device, weight_dtype or dtype)
    return x, weight, torch.randn(cols, dtype=torch.float64).to(device, weight_dtype or dtype) if bias else None


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


RESIDUAL_MIXES = [  # input, residual, residual_dtype
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float64, torch.float64, None),
    (torch.float16, torch.float64, None),
]


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


# --- layouts ----------------------------------------------------------------------------------------------------------
def strided_inputs():
    base = torch.randn(6, 10, 130)
    yield "transposed", base.transpose(0, 1)
    yield "row stride", base[:, :, :96]
    yield "column step", base[:, :, ::2]
    yield "cut rows", base[:, 2:9, :]
    yield "expanded", base[:1].expand(6, 10, 130)
    yield "last transposed", base.transpose(1, 2)
    yield "offset one element", torch.randn(6 * 130 + 1)[1:].view(6, 130)
    yield "one row", base[0, 0]


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_change_bits(device, centred, dtype):
    for name, x in strided_inputs():
        x = x.to(device).to(dtype) if name != "expanded" else x.to(device)
        cols = x.shape[-1]
        w, b = torch.randn(cols, device=device), torch.randn(cols, device=device) if centred else None
        results = []
        for layout in (x, x.contiguous()):
            leaf = layout.detach().requires_grad_()
            out = our_norm(centred, leaf, (cols,), w, b, 1e-5)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
            (gradient,) = torch.autograd.grad(out, leaf, grad)
            results.append((out, gradient))
        assert torch.equal(results[0][0], results[1][0]), name
        assert torch.equal(results[0][1], results[1][1]), name


def test_strided_and_misaligned_gradients_and_weights(device):
    x, weight, _ = make(6, 64, device=device)
    a, w = leaves(x, weight)
    b, v = leaves(x, weight)
    grad = torch.randn(64, 6, device=device).t()
    shifted = torch.randn(65, device=device)
    shifted[1:] = weight
    bigmodel.rms_norm(a, 64, w, 1e-5).backward(grad)
    F.rms_norm(b, (64,), v, 1e-5).backward(grad)
    assert_close(a.grad, b.grad), assert_close(w.grad, v.grad)
    every_other = torch.stack([weight, weight], 1)[:, 0]
    for other in (shifted[1:], every_other):
        assert torch.equal(bigmodel.rms_norm(x, 64, other, 1e-5), bigmodel.rms_norm(x, 64, weight, 1e-5))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)], ids=str)
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_empty(device, centred, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    out = our_norm(centred, x, shape[-1:], weight, None, 1e-5)
    out.sum().backward()
    assert out.shape == shape and x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_callers_tensors_are_not_written(device):
    x, weight, bias = make(6, 100, device=device)
    grad = torch.randn_like(x)
    tensors = (x, weight, bias, grad)
    before = [(t.clone(), t._version) for t in tensors]
    for memory_efficient in (False, True):
        a, w, b = (t.detach().requires_grad_() for t in (x, weight, bias))
        bigmodel.layer_norm(a, 100, w, b, memory_efficient=memory_efficient).backward(grad)
        bigmodel.add_layer_norm(a, grad, 100, w, b)[1].sum().backward()
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value) and t._version == version


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


# --- determinism ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("cols", [100, 5000, 100_000])
def test_bits_depend_on_neither_threads_nor_rows(device, isa, centred, cols):
    rows = max(2, 200_000 // cols)
    x, weight, bias = make(rows, cols, device=device, bias=centred)
    grad = torch.randn_like(x)

    def run(x, grad):
        a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = our_norm(centred, a, (cols,), w, bias, 1e-5)
        out.backward(grad)
        return out.detach(), a.grad, w.grad

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x, grad)
        torch.set_num_threads(2)
        two, again = run(x, grad), run(x, grad)
        torch.set_num_threads(7)
        seven = run(x, grad)
    finally:
        torch.set_num_threads(threads)
    for other in (two, again, seven):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for row in (0, rows - 1):
        alone = run(x[row : row + 1], grad[row : row + 1])
        assert torch.equal(alone[0][0], one[0][row]) and torch.equal(alone[1][0], one[1][row])


# --- hypothesis -------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 6), min_size=0, max_size=3),
    # Over one or two elements the gradient is a difference of equals, and its relative error says nothing.
    normalised=st.lists(st.integers(3, 40), min_size=1, max_size=2),
    pad=st.integers(0, 5),
    shift=st.integers(0, 3),
    centred=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    swap=st.booleans(),
)
def test_any_shape_and_stride(rows, normalised, pad, shift, centred, dtype, swap):
    shape = [*rows, *normalised]
    padded = [*shape[:-1], shape[-1] + pad]
    base = torch.randn(torch.Size(padded).numel() + shift, dtype=torch.float64).to(dtype)[shift:].view(padded)
    x = base[..., : shape[-1]]
    if swap and len(rows) > 1:
        x = x.transpose(0, 1)
    weight = torch.rand(normalised, dtype=torch.float64).to(dtype) + 0.5
    compare(centred, x, tuple(normalised), weight, torch.zeros_like(weight) if centred else None)


# --- large ------------------------------------------------------------------------------------------------------------
def available_gib() -> float:
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**20


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_have_the_bits_of_small_ones(isa, centred, dtype):
    """From 32 MiB on a CPU stores past its caches; whole lines, and a cut row length that falls back."""
    for cols in (4096, 4100):
        rows = (33 << 20) // (cols * dtype.itemsize)
        x = torch.randn(rows, cols, dtype=dtype)
        weight, grad = torch.randn(cols), torch.randn(rows, cols, dtype=dtype)
        pieces = []
        for part in (slice(0, rows), slice(0, 64), slice(rows - 64, rows)):
            leaf = x[part].detach().requires_grad_()
            out = our_norm(centred, leaf, (cols,), weight.requires_grad_(), None, 1e-5)
            (gradient,) = torch.autograd.grad(out, leaf, grad[part])
            pieces.append((out.detach(), gradient))
        for whole, first, last in zip(*pieces, strict=True):
            assert torch.equal(whole[:64], first) and torch.equal(whole[-64:], last)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2**20 + 1, 3], ids=["many rows", "long rows"])
def test_more_than_2_to_31_elements(rows):
    if available_gib() < 14:
        pytest.skip(f"needs 14 GiB of free memory, {available_gib():.0f} are free")
    cols = 2**31 // rows + 2
    x = torch.zeros(rows, cols, dtype=torch.bfloat16)
    x[-1, -1000:] = torch.arange(1000, dtype=torch.float32).to(torch.bfloat16)
    assert x.numel() > 2**31
    x.requires_grad_()
    out = bigmodel.rms_norm(x, cols, eps=1e-5)
    tail = x.detach()[-1, -1000:].double()  # all the rest is zero
    scale = 1 / (tail.square().sum() / cols + 1e-5).sqrt()
    assert_close(out[-1, -1000:].double(), tail * scale, rtol=8e-3, atol=1e-3)
    assert not out.detach()[0, :1000].any() and not out.detach()[-2, -1000:].any()
    dy = out.detach()
    dy[-1, -1000:] = dy[-1, -1000:].flip(0)  # with dy = out the gradient would be a difference of equals
    (grad,) = torch.autograd.grad(out, x, dy)
    xhat, g = tail * scale, dy[-1, -1000:].double()
    expected = scale * (g - xhat * (g * xhat).sum() / cols)
    assert_close(grad[-1, -1000:].double(), expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))
