"""The normalisation ops: shapes, strides, sizes, and bits that depend on neither threads nor batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from large import LARGE, need_gib
from norm_cases import compare, leaves, make, our_norm, strided_inputs
from torch.testing import assert_close

import bigmodel


# --- layouts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_change_bits(device, centred, dtype):
    for name, x in strided_inputs(device, dtype):
        cols = x.shape[-1]
        w, b = torch.randn(cols, device=device), torch.randn(cols, device=device) if centred else None
        results = []
        for layout in (x, x.clone(memory_format=torch.contiguous_format)):
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
@LARGE
@pytest.mark.parametrize("rows", [2**20 + 1, 3], ids=["many rows", "long rows"])
def test_more_than_2_to_31_elements(device, rows):
    need_gib(device, 14)
    cols = 2**31 // rows + 2
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    x[-1, -1000:] = torch.arange(1000, dtype=torch.float32, device=device).to(torch.bfloat16)
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
