"""The softmax ops on masks of every broadcast shape and stride, scores of every layout, and in place."""

from __future__ import annotations

import pytest
import torch
from softmax_cases import compare, normal, plain
from torch.testing import assert_close

import bigmodel

# --- masks ------------------------------------------------------------------------------------------------------------
MASKS = {
    **{str(shape): (shape, lambda t: t) for shape in
       [(5,), (1,), (3, 5), (3, 1), (1, 5), (2, 1, 1), (2, 3, 1), (2, 3, 5), (4, 1, 1, 5), (4, 2, 3, 5),
        (1, 2, 3, 5), (4, 1, 3, 5), (4, 1, 3, 1), (1, 1, 1, 1)]},
    "transposed": ((5, 3), lambda t: t.T),
    "every other": ((3, 10), lambda t: t[:, ::2]),
    "expanded": ((1, 1, 3, 1), lambda t: t.expand(4, 2, 3, 5)),
    "permuted": ((5, 4, 3, 2), lambda t: t.permute(1, 3, 2, 0)),
    "off by one": ((16,), lambda t: t[1:].view(3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_broadcast_shape_and_stride(device, name):
    shape, view = MASKS[name]  # a view that is moved or converted is packed
    scores, base = normal(4, 2, 3, 5, device=device), torch.randn(shape, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        compare(scores, mask=view(base.to(dtype)))
    live = view(base > -0.5)
    assert live.stride() == view(base).stride()
    out = bigmodel.attention_softmax(scores, mask=live)
    assert torch.equal(out, bigmodel.attention_softmax(scores, mask=live.expand(4, 2, 3, 5).contiguous()))
    assert_close(out, plain(scores, mask=live))


@pytest.mark.parametrize("shape", [(2, 1, 4, 3, 1, 6), (2, 5, 1, 3, 4, 6), (1, 6), (2, 5, 4, 3, 4, 6), (4, 1, 1, 6)])
def test_more_dimensions_than_the_kernels_know(device, shape):
    scores = normal(2, 5, 4, 3, 4, 6, device=device)
    compare(scores, mask=normal(*shape, device=device), causal=True, sinks=normal(3, device=device), dropout_p=0.3)


def test_a_broadcast_mask_is_not_expanded_in_memory():
    """Its gradient, and what backward keeps, have the mask's own size."""
    scores, mask = normal(64, 8, 16, 64).requires_grad_(), normal(1, 1, 16, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = bigmodel.attention_softmax(scores, mask=mask)
    assert kept == [out.data_ptr()], "the result is all that backward needs"


def test_gradients_of_a_mask_are_summed_without_losing_digits(device):
    """Thousands of rows share the mask; float32 sums of them, in groups, keep within the accuracy rule."""
    compare(normal(4096, 1, 2, 33, device=device), mask=normal(33, device=device))
    compare(normal(4096, 1, 2, 33, device=device), mask=normal(2, 33, device=device))


# --- layouts ----------------------------------------------------------------------------------------------------------
def strided_scores(device, dtype):
    """(name, tensor): views of what is on its device already, since to move or to convert a view packs it."""
    sizes = (4, 3, 6, 40), (4, 6, 3, 40), (4 * 3 * 6 * 40 + 1,)
    base, heads_last, flat = (torch.randn(size).to(device, dtype) for size in sizes)
    views = {
        "transposed": base.transpose(0, 1),
        "heads last": heads_last.transpose(1, 2),
        "cut rows": base[..., 1:33],
        "cut queries": base[:, :, 2:5],
        "every other key": base[..., ::2],
        "keys first": base.transpose(-1, -2),
        "expanded": base[:1].expand(4, 3, 6, 40),
        "off by one": flat[1:].view(4, 3, 6, 40),
    }
    for name, scores in views.items():
        assert not scores.is_contiguous() or scores.data_ptr() % 16, name
        yield name, scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_scores_and_gradients(device, dtype):
    for name, scores in strided_scores(device, dtype):
        results = []
        for layout in (scores, scores.clone(memory_format=torch.contiguous_format)):
            leaf = layout.detach().requires_grad_()
            out = bigmodel.attention_softmax(leaf, causal=True, softcap=4.0)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(dtype)
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
            (gradient,) = torch.autograd.grad(out, leaf, grad)
            results.append((out, gradient))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 5), (2, 0, 4, 5)], ids=str)
def test_empty(device, shape):
    scores = torch.randn(shape, device=device, requires_grad=True)
    mask = torch.randn(shape[-2:], device=device, requires_grad=True)
    sinks = torch.randn(shape[-3], device=device, requires_grad=True) if len(shape) > 2 else None
    out = bigmodel.attention_softmax(scores, mask=mask, sinks=sinks, dropout_p=0.1)
    out.sum().backward()
    assert out.shape == scores.grad.shape == shape
    assert torch.equal(mask.grad, torch.zeros_like(mask))
    assert sinks is None or torch.equal(sinks.grad, torch.zeros_like(sinks))
    assert bigmodel.softmax(scores).shape == shape


def test_the_callers_tensors_are_not_written(device):
    scores, mask, sinks = (normal(*size, device=device).requires_grad_() for size in ((2, 3, 4, 9), (4, 9), (3,)))
    grad = torch.randn(2, 3, 4, 9, device=device)
    tensors = (scores, mask, sinks, grad)
    before = [(t.detach().clone(), t._version) for t in tensors]
    bigmodel.attention_softmax(scores, mask=mask, sinks=sinks, softcap=2.0, dropout_p=0.5).backward(grad)
    bigmodel.softmax(scores, 1).backward(grad)
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value) and t._version == version


# --- in place ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout_p": 0.4}, {"sinks": torch.zeros(3)}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "heads second", "keys first"])
def test_in_place(device, options, layout):
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    base = normal(2, 3, 4, 9, device=device)
    if layout == "heads second":
        base = base.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "keys first":
        base = base.mT.contiguous().mT
    results = []
    for inplace in (False, True):
        torch.manual_seed(5)
        leaf = base.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        scores = leaf * 1
        version = scores._version
        out = bigmodel.attention_softmax(scores, causal=True, inplace=inplace, **options)
        assert (out is scores) == inplace and (scores._version > version) == inplace
        out.backward(torch.linspace(-1, 1, 216, device=device).view(2, 3, 4, 9))
        results.append((out.detach().clone(), leaf.grad))
    assert_close(results[0], results[1])


def test_in_place_bumps_the_version_without_autograd_too(device):
    scores = normal(3, 5, device=device)
    version = scores._version
    assert bigmodel.attention_softmax(scores, inplace=True) is scores
    assert scores._version > version


def test_in_place_into_a_view(device):
    base = normal(6, 4, 5, device=device).requires_grad_()
    scores = (base * 1).view(2, 3, 4, 5)
    bigmodel.attention_softmax(scores, inplace=True).square().sum().backward()
    ours, base.grad = base.grad, None
    torch.softmax(base, -1).square().sum().backward()
    assert_close(ours, base.grad)


def test_in_place_of_dimensions_that_do_not_fold(device):
    scores = normal(3, 2, 2, 2, 4, 5, device=device).transpose(0, 1)
    expected = torch.softmax(scores, -1)
    assert bigmodel.attention_softmax(scores, inplace=True) is scores
    assert_close(scores, expected)


@pytest.mark.parametrize(("dtype", "option"), [(torch.float32, "causal"), (torch.float32, "window"),
                                               (torch.float32, "mask"), (torch.bfloat16, "causal")])  # fmt: skip
def test_results_stored_past_the_caches_are_the_same(isa, dtype, option):
    """As those of 32 MiB are into memory that is there already; four of the heads alone are not."""
    heads = (32 << 20) // (512 * 512 * dtype.itemsize)
    scores, grad = (torch.randn(heads, 512, 512).to(dtype) for _ in range(2))
    mask = torch.rand(512, 512) > 0.5
    mask[7], mask[:, 300:] = False, False
    options = {"causal": {"causal": True}, "window": {"window": (100, 50)}, "mask": {"mask": mask}}[option]

    def call(begin, end):
        sinks = torch.linspace(-1, 1, heads, dtype=dtype)[begin:end] if option == "window" else None
        leaf = scores[begin:end].clone().requires_grad_()
        out = bigmodel.attention_softmax(leaf, scale=0.5, sinks=sinks, **options)
        return out.detach(), *torch.autograd.grad(out, leaf, grad[begin:end])

    call(0, heads)
    whole = call(0, heads)
    for begin in (0, heads - 4):
        for large, small in zip(whole, call(begin, begin + 4), strict=True):
            assert torch.equal(large[begin : begin + 4], small)
