"""The softmax ops: values and gradients under every combination of options, shapes and layouts, determinism."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FLOATS, assert_accurate
from hypothesis import given, settings
from large import LARGE, need_gib
from softmax_cases import calls, compare, leaves, normal, plain
from torch.testing import assert_close

import bigmodel
from bigmodel.ops import _softmax_reference

LOW = [torch.bfloat16, torch.float16]


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", [64, 131])
def test_values_and_gradients(device, isa, dtype, keys):
    scores = normal(2, 3, 5, keys, dtype=dtype, device=device)
    compare(scores, scale=0.3)
    mask = torch.rand(2, 1, 1, keys, device=device) > 0.3
    compare(scores, scale=0.3, mask=mask, causal=True)
    bias = normal(3, 5, keys, dtype=dtype, device=device)
    slopes, sinks = torch.rand(3, device=device), normal(3, dtype=dtype, device=device)
    compare(scores, scale=0.3, mask=bias, alibi_slopes=slopes, softcap=3.0, sinks=sinks, dropout_p=0.2)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_every_combination_of_options(call):
    scores, options = call
    compare(scores, **options)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_error_is_no_more_than_stocks(isa, log, dtype):
    """Both accuracy rules to the letter, where there are enough rows for the second to mean something."""
    ours, stock = (bigmodel.log_softmax, torch.log_softmax) if log else (bigmodel.softmax, torch.softmax)
    x = normal(2048, 520, dtype=dtype)
    a, b, double = leaves(x, x, x.double())
    grad = normal(2048, 520, dtype=dtype, spread=1)
    out, other, exact = ours(a, -1), stock(b, -1), stock(double, -1)
    assert_accurate(out, other, exact.detach(), strict=True)
    out.backward(grad), other.backward(grad), exact.backward(grad.double())
    assert_accurate(a.grad, b.grad, double.grad, "gradient", strict=True)


@pytest.mark.parametrize("keys", [*range(1, 40), 63, 65, 127, 129, 511, 1000, 1233, 1234])
def test_any_number_of_keys(device, keys):
    scores = normal(1, 2, 3, keys, device=device)
    compare(scores, causal=keys % 2 == 0, sinks=normal(2, device=device) if keys % 3 == 0 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keys", [65537, 150_001])
def test_rows_of_several_parts(dtype, keys):
    scores, mask = normal(2, 2, 1, keys, dtype=dtype), torch.rand(keys) > 0.5
    compare(scores, mask=mask, sinks=normal(2, dtype=dtype), scale=2.0)
    compare(scores, mask=normal(1, keys, dtype=dtype), window=(100_000, None), dropout_p=0.5)
    x = scores[0, 0]
    assert_close(bigmodel.log_softmax(x).double(), torch.log_softmax(x.double(), -1), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (7, 1), (5, 9), (9, 5), (1, 1), (130, 70), (3, 200)])
@pytest.mark.parametrize("window", [None, (0, 0), (3, None), (None, 2), (2, 5)], ids=str)
def test_queries_and_keys_of_different_number(device, queries, keys, window):
    scores = normal(2, 2, queries, keys, device=device)
    for causal in (False, True):
        out = compare(scores, causal=causal, window=window, alibi_slopes=torch.rand(2, device=device))
        assert not out[plain(scores.double(), causal=causal, window=window) == 0].any()


def test_causal_is_aligned_at_the_bottom_right(device):
    out = bigmodel.attention_softmax(torch.zeros(2, 4, device=device), causal=True)
    third = 1 / 3
    assert_close(out, torch.tensor([[third, third, third, 0], [0.25] * 4], device=device))


@pytest.mark.parametrize("exponent", [-120, -104, -103, -100, -88, -87, -50, -20, -19, -18])
def test_exp_is_accurate_to_two_ulp(isa, exponent):
    """Beside a 0, of which exp(x) is less than a rounding, the result is exp(x) itself."""
    x = torch.linspace(exponent - 1, exponent, 4001)
    rows = torch.stack([torch.zeros_like(x), x], -1)
    y = bigmodel.softmax(rows)[:, 1].double()
    exact = x.double().exp()
    ulp = torch.where(exact >= 2.0**-126, torch.exp2(exact.clamp_min(2.0**-126).log2().floor() - 23), 2.0**-149)
    assert ((y - exact).abs() / ulp).max() <= 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_excluded_elements_are_exact_zeros(device, isa, dtype):
    scores = normal(1, 2, 40, 40, dtype=dtype, device=device)
    mask = torch.rand(40, 40, device=device) > 0.5
    out = bigmodel.attention_softmax(scores, mask=mask, causal=True)
    live = mask & torch.ones_like(mask).tril()
    assert not out[..., ~live].any() and out[..., live].all()
    bias = torch.zeros(40, 40, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)
    assert torch.equal(out, bigmodel.attention_softmax(scores, mask=bias, causal=True))


def test_what_is_excluded_is_not_read(device):
    """NaN and infinities outside causal and window, and under a mask, reach neither results nor gradients."""
    scores = normal(2, 8, 8, device=device)
    live = torch.ones(8, 8, dtype=torch.bool, device=device).tril()
    expected = bigmodel.attention_softmax(scores, causal=True)
    for value in (math.nan, math.inf, -math.inf):
        poisoned = scores.masked_fill(~live, value).requires_grad_()
        for options in ({"causal": True}, {"mask": live}, {"mask": torch.where(live, 0.0, -torch.inf)}):
            out = bigmodel.attention_softmax(poisoned, **options)
            assert torch.equal(out, expected)
        grad = torch.ones(2, 8, 8, device=device).masked_fill(~live, value)
        (gradient,) = torch.autograd.grad(bigmodel.attention_softmax(poisoned, causal=True), poisoned, grad)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("way", ["bool", "additive", "causal", "window", "scores"])
def test_a_row_with_nothing_to_attend_to_is_zero(device, way, sinks):
    scores = normal(1, 2, 6, 4, device=device)
    options = {}
    if way == "bool":
        options["mask"] = torch.zeros(4, dtype=torch.bool, device=device)
    elif way == "additive":
        options["mask"] = torch.full((6, 4), -math.inf, device=device, requires_grad=True)
    elif way == "causal":
        options["causal"] = True  # the first two queries stand before the first key
    elif way == "window":
        options["window"] = (0, 0)
    else:
        scores[:] = -math.inf
    dead = slice(0, 2) if way in ("causal", "window") else slice(None)
    scores.requires_grad_()
    sink = torch.zeros(2, device=device, requires_grad=True) if sinks else None
    out = bigmodel.attention_softmax(scores, sinks=sink, **options)
    out.backward(torch.randn_like(out))
    assert not out[..., dead, :].any() and not scores.grad[..., dead, :].any()
    assert torch.isfinite(scores.grad).all()
    for leaf in (sink, options.get("mask")):
        if leaf is not None and leaf.requires_grad:
            assert torch.isfinite(leaf.grad).all()


def test_finite_masks_and_scores_are_ordinary_numbers(device):
    low = torch.finfo(torch.float32).min
    scores = torch.tensor([[low, low], [-2e4, -2e4 + 1], [-1e4, 0.0]], device=device)
    assert_close(bigmodel.attention_softmax(scores), torch.softmax(scores, -1))
    uniform = bigmodel.attention_softmax(torch.zeros(1, 3, device=device), mask=torch.full((1, 3), low, device=device))
    assert_close(uniform, torch.full((1, 3), 1 / 3, device=device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.3, 0.7, 80**-0.5])
@pytest.mark.parametrize("keys", [4, 37])
def test_large_scores_of_one_value_share_alike(device, isa, dtype, scale, keys):
    """The largest score less itself is 0 whatever the size: a fused product left half an ulp, NaN beyond 1e9."""
    largest = torch.finfo(dtype).max
    values = [v for v in (-1e30, 1e30, 1.2345e10, -1e300, -largest) if abs(v) <= largest]
    scores = torch.tensor(values, dtype=dtype, device=device)[:, None].expand(-1, keys).reshape(1, 1, -1, keys)
    out = bigmodel.attention_softmax(scores.contiguous(), scale=scale)
    assert_close(out, torch.full_like(out, 1 / keys))


def test_special_values_follow_stock(device):
    x = normal(6, 40, device=device)
    x[0, 3], x[1, 3], x[2, 5], x[3], x[4] = math.nan, math.inf, -math.inf, -math.inf, math.nan
    for ours, stock in ((bigmodel.softmax, torch.softmax), (bigmodel.log_softmax, torch.log_softmax)):
        assert_close(ours(x, -1), stock(x, -1), equal_nan=True)


def test_an_excluded_nan_has_no_gradient_under_a_soft_cap(device):
    scores = normal(1, 1, 2, 4, device=device)
    scores[0, 0, 0, 1] = math.nan
    scores.requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    mask[0, 1] = False
    bigmodel.attention_softmax(scores, mask=mask, softcap=5.0).square().sum().backward()
    assert scores.grad[0, 0, 0, 1] == 0 and scores.grad.isfinite().all()


def test_large_offsets_cost_no_digits(device):
    x = normal(8, 300, device=device) + 1000
    assert_accurate(bigmodel.softmax(x), torch.softmax(x, -1), torch.softmax(x.double(), -1))


# --- plain softmax ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    "shape", [(), (5,), (3, 4), (6, 1), (2, 7, 1, 1), (2, 3, 4, 5), (2, 2, 2, 3, 2, 4), (3, 0, 2), (70, 300)], ids=str
)
def test_any_dimension_of_any_shape(device, name, shape):
    ours, stock = getattr(bigmodel, name), getattr(torch, name)
    x = normal(*shape, device=device)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        a, b = leaves(x, x)
        out, other = ours(a, dim), stock(b, dim)
        grad = torch.randn(shape, device=device)
        out.backward(grad), other.backward(grad)
        assert out.is_contiguous()
        assert_close(out, other), assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dtype_means_what_it_means_in_torch(device, name):
    ours, stock = getattr(bigmodel, name), getattr(torch, name)
    for source in FLOATS:
        x = normal(6, 50, dtype=source, device=device)
        for target in (None, *FLOATS):
            exact = stock(x.to(target or source).double(), 1)
            a, b = leaves(x, x)
            out, other = ours(a, 1, target), stock(b, 1, target)
            assert out.dtype is other.dtype
            narrow = any(dtype in (source, target) for dtype in LOW)
            tolerance = {"rtol": 2e-2, "atol": 4e-2} if narrow else {"rtol": 1e-4, "atol": 1e-5}
            assert_close(out, other, **tolerance)
            assert_accurate(out, other, exact)
            grad = normal(6, 50, dtype=out.dtype, device=device)
            out.backward(grad), other.backward(grad)
            assert a.grad.dtype is source
            assert_close(a.grad, b.grad, **tolerance)


# --- dropout ----------------------------------------------------------------------------------------------------------
def test_philox_is_the_published_one():
    """The first known answer of Random123 (Salmon et al., SC 2011): counter and key 0."""
    words = _softmax_reference.philox(torch.tensor(0), torch.tensor([0]))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_keep_rate(isa, dropout_p):
    n = 500_000
    out = bigmodel.attention_softmax(torch.zeros(500, 1000), dropout_p=dropout_p)
    kept = out != 0
    assert abs(float(kept.float().mean()) - (1 - dropout_p)) < 5 * math.sqrt(dropout_p * (1 - dropout_p) / n)
    assert_close(out[kept], torch.full_like(out[kept], 1 / (1000 * (1 - dropout_p))))
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert abs(float(neighbours) - (1 - dropout_p) ** 2) < 5e-3, "neighbours are independent"


def test_dropout_repeats_and_follows_torchs_generator(device):
    scores = normal(2, 3, 17, device=device)

    def call(seed):
        torch.manual_seed(seed)
        return bigmodel.attention_softmax(scores, dropout_p=0.5)

    assert torch.equal(call(1), call(1)) and not torch.equal(call(1), call(2))
    torch.manual_seed(1)
    first, second = (bigmodel.attention_softmax(scores, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second), "each call draws a seed of its own"


def test_backward_drops_the_very_same_elements(device, isa):
    """With grad_out of ones at one element only, the gradient of that row is zero where it was dropped."""
    scores = normal(40, 37, device=device).requires_grad_()
    out = bigmodel.attention_softmax(scores, dropout_p=0.5)
    dropped = out == 0
    diagonal = torch.zeros_like(out)
    for row in range(37):
        diagonal[row, row] = 1
    (grad,) = torch.autograd.grad(out, scores, diagonal)
    for row in range(37):
        assert bool(dropped[row, row]) == (not grad[row].any())


def test_the_seed_drops_the_same_on_every_instruction_set(device, isa):
    torch.manual_seed(3)
    out = bigmodel.attention_softmax(torch.zeros(3, 2, 5, 13, device=device), dropout_p=0.3)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), device=device)
    assert torch.equal(out != 0, _softmax_reference.kept(seed, out.shape, 0.3))


# --- determinism ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", [100, 3000, 140_000])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_depend_on_neither_threads_nor_rows(isa, keys, causal):
    queries = max(2, 60_000 // keys)
    scores, grad = normal(2, 2, queries, keys), normal(2, 2, queries, keys)
    bias = normal(queries, keys) if keys < 100_000 else None
    sinks = normal(2)

    def run(rows=slice(None)):
        torch.manual_seed(0)
        leaf = scores[rows].detach().requires_grad_()
        mask = None if bias is None else bias.clone().requires_grad_()
        sink = sinks.clone().requires_grad_()
        out = bigmodel.attention_softmax(leaf, mask=mask, causal=causal, sinks=sink)
        out.backward(grad[rows])
        return out.detach(), leaf.grad, sink.grad, *([] if mask is None else [mask.grad])

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run())
        alone = run(slice(1, 2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(alone[0][0], results[0][0][1]) and torch.equal(alone[1][0], results[0][1][1])


def test_a_row_depends_on_its_live_range_alone(isa):
    """Cut out of a long row by causal and window, or given as it is, the same keys give the same bits."""
    scores = normal(1, 3000)
    cut = bigmodel.attention_softmax(scores, window=(1500, None))[:, -1501:]
    assert torch.equal(cut, bigmodel.attention_softmax(scores[:, -1501:].contiguous()))


@pytest.mark.slow
@LARGE
def test_more_than_2_to_31_elements(device):
    need_gib(device, 14)
    queries, keys = 2**15 + 1, 2**16
    x = torch.zeros(queries, keys, dtype=torch.bfloat16, device=device)
    x[-1, -3:] = torch.tensor([5.0, 0.0, 1.0], device=device)
    assert x.numel() > 2**31
    out = bigmodel.attention_softmax(x, window=(2, 0), inplace=True)
    assert_close(out[-1, -3:].cpu(), torch.softmax(torch.tensor([5.0, 0.0, 1.0]), 0).bfloat16())
    assert not out[-1, :-3].any() and not out[-2, -1].any()
    assert_close(out[-2, -4:-1].float().cpu(), torch.full((3,), 1 / 3), rtol=1e-2, atol=0)
