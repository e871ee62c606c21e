"""bigmodel.clip_grad_norm_ and bigmodel.optim.EMA, beside optimizers of others."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from optim_cases import SHAPES, clones, gradient, parameters, same_values, through_a_file
from torch import nn, optim
from torch.testing import assert_close

import bigmodel
from bigmodel.optim import EMA

# --- clip_grad_norm_ --------------------------------------------------------------------------------------------------


def test_signature_is_torchs():
    ours = inspect.signature(bigmodel.clip_grad_norm_).parameters
    stock = inspect.signature(nn.utils.clip_grad_norm_).parameters
    assert [(name, p.default) for name, p in ours.items()] == [(name, p.default) for name, p in stock.items()]


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6, 0.0])
@pytest.mark.parametrize("norm_type", [2.0, 1, math.inf, "inf", 3.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gives_torchs_norm_and_gradients(dtype, norm_type, max_norm):
    shapes = tuple(shape for shape in SHAPES if 0 not in shape)  # of no elements torch has no infinity norm
    ours, stock = parameters(shapes, dtype), parameters(shapes, dtype)
    ours.append(nn.Parameter(torch.ones(3)))  # without a gradient
    gradient(ours[:-1], 0)
    gradient(stock, 0)
    before = [p.grad.clone() for p in stock]
    versions = [p.grad._version for p in ours[:-1]]
    norm = bigmodel.clip_grad_norm_(iter(ours), max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(stock, max_norm, norm_type, foreach=False)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-6}[dtype]
    assert_close(norm.double(), expected.double(), rtol=10 * tolerance, atol=0)
    for p, q, g in zip(ours[:-1], stock, before, strict=True):
        assert_close(p.grad, q.grad, rtol=4 * tolerance, atol=0)
        assert max_norm < 1e6 or torch.equal(p.grad, g)
    assert all(p.grad._version > v for p, v in zip(ours[:-1], versions, strict=True) if p.numel())


def test_gradients_without_elements_count_as_nothing():
    params = parameters()
    gradient(params, 0)
    largest = max(p.grad.abs().max() for p in params if p.numel())
    assert bigmodel.clip_grad_norm_(params, math.inf, math.inf) == largest


def test_one_tensor_no_gradients_and_a_generator_that_is_empty():
    p = nn.Parameter(torch.ones(4))
    assert bigmodel.clip_grad_norm_(p, 1.0).item() == 0.0
    p.grad = torch.full((4,), 2.0)
    assert bigmodel.clip_grad_norm_(p, 1.0, foreach=True).item() == 4.0
    assert_close(p.grad, torch.full((4,), 0.5))
    with pytest.warns(UserWarning, match="empty generator"):
        assert bigmodel.clip_grad_norm_((q for q in ()), 1.0).item() == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_norms_raise_only_where_asked(bad):
    params = parameters()
    gradient(params, 0)
    params[0].grad[2] = bad
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match="The total norm of order 2.0 for gradients from `parameters` is non-finite"):
        bigmodel.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(p.grad, g) or bad != bad for p, g in zip(params, before, strict=True))
    assert not bigmodel.clip_grad_norm_(params, 1.0).isfinite()


@pytest.mark.parametrize("change", ["moved", "another dtype", "fewer", "scattered", "the same"])
def test_what_happens_to_gradients_between_calls_is_seen(change):
    """Tables of addresses are kept between calls; the old memory is filled with NaN, so a stale one would be seen."""
    params = [nn.Parameter(torch.zeros(40, 40)), nn.Parameter(torch.zeros(300))]
    gradient(params, 0)
    bigmodel.clip_grad_norm_(params, 1.0)
    gradient_before = params[0].grad
    if change == "moved":
        params[0].grad = gradient_before * 3
    elif change == "another dtype":
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch casts gradients (2.6 does, 2.13 not)")
        params[0].grad = None
        params[0].grad_dtype = torch.bfloat16
        params[0].grad = (gradient_before * 3).bfloat16()
    elif change == "fewer":
        params.pop(0)
    elif change == "scattered":
        params[0].grad = torch.randn(40, 80)[:, ::2]
    if change != "the same":
        gradient_before.fill_(math.nan)
    for p in params:
        p.grad.mul_(5)
    stock = [nn.Parameter(torch.zeros_like(p)) for p in params]
    for p, q in zip(params, stock, strict=True):
        q.grad = p.grad.float().clone()
    norm = bigmodel.clip_grad_norm_(params, 1.0)
    assert_close(norm, nn.utils.clip_grad_norm_(stock, 1.0), rtol=1e-5, atol=0)
    for p, q in zip(params, stock, strict=True):
        assert_close(p.grad.float(), q.grad, rtol=2**-7 if change == "another dtype" else 1e-5, atol=0)


def test_clipping_refuses_sparse_gradients():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        bigmodel.clip_grad_norm_(embedding.parameters(), 1.0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((5, 1.0), "parameters must be a tensor or tensors, got int"),
        ((None, 1.0), "parameters must be a tensor or tensors, got NoneType"),
        (([1], 1.0), r"parameters\[0\] must be a torch.Tensor, got int"),
        (({"a": 1}, 1.0), r"parameters\[0\] must be a torch.Tensor, got str"),
        (([], "x"), "max_norm must be a number, got 'x'"),
        (([], None), "max_norm must be a number, got NoneType"),
        (([], torch.ones(2)), r"max_norm must be a number, got a tensor of shape \(2,\)"),
        (([], -1.0), "max_norm is -1.0; it must be at least 0"),
        (([], float("nan")), "max_norm is nan; it must be at least 0"),
        (([], 1.0, "x"), "norm_type must be a number, got 'x'"),
        (([], 1.0, 2.0, "x"), "error_if_nonfinite must be a bool, got str"),
    ],
    ids=str,
)
def test_clipping_refuses_what_it_cannot_take(arguments, words):
    with pytest.raises((TypeError, ValueError), match=f"^clip_grad_norm_: {words}.$"):
        bigmodel.clip_grad_norm_(*arguments)


def test_the_norm_has_the_same_bits_with_any_number_of_threads():
    params = [nn.Parameter(torch.zeros(300_001)), nn.Parameter(torch.zeros(7))]
    gradient(params, 0)
    norms, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.add(bigmodel.clip_grad_norm_(params, math.inf).item())
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


# --- EMA --------------------------------------------------------------------------------------------------------------


def trained(model, ema=None, steps=4):
    optimizer = optim.RMSprop(model.parameters(), lr=0.05)
    weights = []
    for step in range(steps):
        gradient(list(model.parameters()), step)
        optimizer.step()
        if ema is not None:
            ema.update()
        weights.append([p.detach().clone() for p in model.parameters()])
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averages_follow_the_weights(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expected = [p.detach().to(wide, copy=True) for p in model.parameters()]
    ema = EMA(model, 0.8)
    for weights in trained(model, ema):
        expected = [e + 0.2 * (w.to(wide) - e) for e, w in zip(expected, weights, strict=True)]
    assert list(ema.averages) == [name for name, _ in model.named_parameters()]
    for average, e in zip(ema.averages.values(), expected, strict=True):
        assert_close(average, e, rtol=1e-6, atol=1e-6)
        assert average.dtype is wide
    before = clones(model.parameters())
    with ema.weights():
        assert same_values(model.parameters(), [a.to(dtype) for a in ema.averages.values()])
        with pytest.raises(RuntimeError, match=r"update\(\) was called inside weights"):
            ema.update()
        with pytest.raises(RuntimeError, match=r"inside weights\(\)"), ema.weights():
            pass
    assert same_values(model.parameters(), before)


def test_an_average_is_saved_and_goes_on():
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    trained(model, ema)
    other = copy.deepcopy(model)
    resumed = EMA(other, 0.9)
    resumed.load_state_dict(through_a_file(ema.state_dict()))
    assert resumed.decay == 0.5
    for module, average in ((model, ema), (other, resumed)):
        trained(module, average, 2)
    assert same_values(ema.averages.values(), resumed.averages.values())
    with pytest.raises(ValueError, match="has 'bias', which the model does not have"):
        EMA(nn.Sequential(nn.Linear(3, 2)), 0.5).load_state_dict(ema.state_dict())


def test_frozen_parameters_join_when_they_are_trained():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = EMA(model, 0.5)
    assert list(ema.averages) == ["weight"]
    model.bias.requires_grad_(True)
    ema.update()
    assert torch.equal(ema.averages["bias"], model.bias)
    model.to(torch.float64)
    ema.update()
    assert torch.equal(ema.averages["bias"].double(), model.bias)


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(ValueError, match="^bigmodel.optim.EMA: decay is .*; it must be at least 0 and below 1.$"):
        EMA(nn.Linear(2, 2), decay)


@pytest.mark.parametrize("model", [None, "x", [torch.ones(2)]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match="^bigmodel.optim.EMA: model must be a torch.nn.Module, got"):
        EMA(model, 0.9)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"averages": {"weight": torch.ones(3)}}, r"the average of 'weight' has shape \(3,\), but the .*"),
        ({"averages": {"weight": torch.ones(3, 3).int()}}, "the average of 'weight' must be .*, got torch.int32"),
        ({"averages": {"weight": [1.0]}}, "the average of 'weight' must be a floating-point tensor, got list"),
        ({"decay": 5.0}, "decay is 5.0; it must be at least 0 and below 1"),
        ({"decay": "x"}, "decay must be a number, got str"),
    ],
    ids=["shape", "dtype", "list", "decay", "text"],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, words):
    ema = EMA(nn.Linear(3, 3), 0.5)
    before, good = ema.state_dict(), {"decay": 0.25, "averages": {"bias": torch.ones(3), "weight": torch.ones(3, 3)}}
    changed = {**good, **change}
    if "averages" in change:
        changed["averages"] = {**good["averages"], **change["averages"]}
    with pytest.raises((TypeError, ValueError), match=f"^bigmodel.optim.EMA: {words}.$"):
        ema.load_state_dict(changed)
    assert ema.decay == 0.5 and all(ema.averages[name] is value for name, value in before["averages"].items())
    with pytest.raises(ValueError, match="what is loaded must have 'decay' and 'averages'"):
        ema.load_state_dict({})


def test_a_decay_that_is_set_is_checked():
    ema = EMA(nn.Linear(3, 3), 0.5)
    ema.decay = 1.5
    with pytest.raises(ValueError, match="EMA: decay is 1.5"):
        ema.update()


def test_it_is_the_average_that_adamw_keeps():
    ours, stock = nn.Linear(4, 3), nn.Linear(4, 3)
    stock.load_state_dict(ours.state_dict())
    inside = bigmodel.optim.AdamW(ours.parameters(), lr=0.1, ema_decay=0.75)
    outside, ema = bigmodel.optim.AdamW(stock.parameters(), lr=0.1), EMA(stock, 0.75)
    for step in range(4):
        for model, optimizer in ((ours, inside), (stock, outside)):
            gradient(list(model.parameters()), step)
            optimizer.step()
        ema.update()
    for p, average in zip(ours.parameters(), ema.averages.values(), strict=True):
        assert_close(inside.state[p]["ema"], average, rtol=1e-6, atol=1e-7)
