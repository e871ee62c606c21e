"""Checkpoints of bigmodel.optim, to and from torch.optim too."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from optim_cases import LARGE, clones, gradient, parameters, same_state, same_values, steps, through_a_file
from torch import nn, optim
from torch.testing import assert_close

from bigmodel.ops.adam import dequantise, quantise
from bigmodel.optim import SGD, Adagrad, Adam, AdamW
from bigmodel.optim._state import _requantise, decoded

FORMATS = ["float32", "bfloat16", "8bit", "param"]
PAIRS = {AdamW: optim.AdamW, Adam: optim.Adam, SGD: optim.SGD, Adagrad: optim.Adagrad}
each_class = pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)

# --- saved and loaded -------------------------------------------------------------------------------------------------


def interrupted(make, dtype=torch.float32, shapes=LARGE):
    """Six steps at once, and three, a file, new objects, and three more: (params, optimizer) of both."""
    whole = parameters(shapes, dtype)
    first = make(whole)
    steps(first, 6)
    before = parameters(shapes, dtype)
    stopped = make(before)
    steps(stopped, 3)
    saved = through_a_file({"params": [p.detach() for p in before], "optimizer": stopped.state_dict()})
    after = parameters(shapes, dtype, seed=9)
    second = make(after)
    with torch.no_grad():
        for p, value in zip(after, saved["params"], strict=True):
            p.copy_(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(saved["optimizer"])
    assert same_state(second, stopped)
    steps(second, 3, first=3)
    return (whole, first), (after, second)


@pytest.mark.parametrize("more", [{}, {"amsgrad": True, "ema_decay": 0.9, "max_grad_norm": 0.5}], ids=["plain", "all"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_save_load_step_gives_the_bits_of_no_interruption(state_dtype, dtype, masters, more):
    options = {"lr": 0.01, "state_dtype": state_dtype, "master_weights": masters, **more}
    (whole, first), (after, second) = interrupted(lambda params: AdamW(params, **options), dtype)
    assert same_values(whole, after) and same_state(first, second)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8, "param": dtype}
    assert second.state[after[0]]["exp_avg"].dtype is formats[state_dtype]
    assert ("master" in second.state[after[0]]) == (masters and dtype is not torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_goes_on_with_its_bits(dtype):
    def make(params):
        return AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.01, stochastic_rounding=True)

    (whole, _), (after, _) = interrupted(make, dtype)
    assert same_values(whole, after)
    nearest = parameters(LARGE, dtype)
    steps(AdamW(nearest, lr=0.01), 6)
    assert not same_values(whole, nearest)


@pytest.mark.parametrize("cls, options", [(SGD, {"momentum": 0.9, "dampening": 0.5}), (SGD, {}), (Adagrad, {})])
def test_the_others_go_on_with_their_bits(cls, options):
    (whole, first), (after, second) = interrupted(lambda params: cls(params, **options))
    assert same_values(whole, after) and same_state(first, second)


def test_8_bit_moments_are_for_parameters_of_4096_elements_or_more():
    params = parameters(((4095,), (4096,)))
    optimizer = AdamW(params, state_dtype="8bit")
    steps(optimizer, 1)
    small, large = (optimizer.state[p] for p in params)
    assert small["exp_avg"].dtype is torch.float32 and "exp_avg_scale" not in small
    for name in ("exp_avg", "exp_avg_sq"):
        assert large[name].dtype is torch.uint8 and large[name].shape == (4096,)
        assert large[f"{name}_scale"].shape == (16,) and large[f"{name}_scale"].dtype is torch.float32


def test_codes_are_encoded_anew_for_a_parameter_in_another_order_of_memory():
    """A scale belongs to 256 codes in memory. Of values of many magnitudes a scale of another block is far off."""
    saved = nn.Parameter(torch.zeros(32, 16, 3, 3))
    optimizer = AdamW([saved], state_dtype="8bit")
    saved.grad = torch.randn(32, 16, 3, 3) * torch.logspace(-3, 0, 16).view(16, 1, 1)
    optimizer.step()
    exact = 0.1 * saved.grad
    loaded = nn.Parameter(torch.zeros(32, 16, 3, 3).to(memory_format=torch.channels_last))
    other = AdamW([loaded], state_dtype="8bit")
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_state(optimizer, other)
    loaded.grad = torch.zeros_like(loaded)
    other.step()
    state = other.state[loaded]
    assert state["exp_avg"].dtype is torch.uint8 and state["exp_avg"].stride() == loaded.stride()
    assert (decoded(state, "exp_avg") - 0.9 * exact).norm() <= 0.02 * exact.norm()


def test_values_that_were_8_bit_before_give_their_codes_and_steps_again():
    """What a sharded checkpoint rests on: float32 and back changes no bit, of negative largest values too."""
    values = torch.randn(100_000) * torch.logspace(-12, 3, 100_000)
    for signed in (True, False):
        codes, scales = quantise(values if signed else values.abs(), signed)
        floats = dequantise(codes, scales, signed)
        again, new_scales = _requantise(floats, signed)
        assert torch.equal(dequantise(again, new_scales, signed), floats)
        assert torch.equal(again, codes)
        assert (new_scales / scales - 1).abs().max() <= 2**-23
    fresh, fresh_scales = _requantise(values, True)
    expected, expected_scales = quantise(values, True)
    assert torch.equal(fresh, expected) and torch.equal(fresh_scales, expected_scales)


# --- torch.optim's checkpoints ----------------------------------------------------------------------------------------

RESUME = [(AdamW, {}), (AdamW, {"amsgrad": True}), (Adam, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9}), (SGD, {})]
RESUME += [(SGD, {"momentum": 0.9, "dampening": 0.5}), (Adagrad, {"lr_decay": 0.1})]


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("cls, options", RESUME)
def test_a_run_goes_on_in_the_other_library(cls, options, direction):
    kinds = (PAIRS[cls], cls) if direction == "from torch" else (cls, PAIRS[cls])
    uninterrupted, moved = parameters(), parameters()
    steps(PAIRS[cls](uninterrupted, **options), 6)
    first = kinds[0](moved, **options)
    steps(first, 3)
    second = kinds[1](moved, lr=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(through_a_file(first.state_dict()))
    steps(second, 3, first=3)
    for p, q in zip(uninterrupted, moved, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
    theirs, ours = (o.state_dict() for o in ((first, second) if direction == "from torch" else (second, first)))
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    extra = {"started"} if options.get("dampening") else set()
    for key, state in theirs["state"].items():
        assert state.keys() - extra == ours["state"][key].keys() - extra
        assert all(v.shape == ours["state"][key][name].shape for name, v in state.items() if name not in extra)


def test_settings_that_a_torch_checkpoint_lacks_keep_theirs_and_copies_start_from_the_parameters_with_one_warning():
    params = parameters(LARGE, torch.bfloat16)
    stock = optim.AdamW(params, lr=0.25)
    steps(stock, 2)
    options = {"ema_decay": 0.9, "master_weights": True, "state_dtype": "8bit", "max_grad_norm": 1.0}
    ours = AdamW(params, lr=0.5, **options)
    with pytest.warns(UserWarning) as caught:
        ours.load_state_dict(through_a_file(stock.state_dict()))
    assert len(caught) == 1 and "no average of the weights ('ema') and no float32 copy" in str(caught[0].message)
    assert caught[0].filename == __file__
    group = ours.param_groups[0]
    assert group["lr"] == 0.25 and group["ema_decay"] == 0.9 and group["state_dtype"] == "8bit"
    with torch.no_grad():
        for p in params:
            p.fill_(2.0)  # a model whose weights are loaded after its optimizer's state
    gradient(params, 2, scale=0.0)
    group["lr"] = 0.0
    ours.step()
    state = ours.state[params[0]]
    assert state["step"] == 3 and state["exp_avg"].dtype is torch.uint8
    for name in ("ema", "master"):
        assert state[name].dtype is torch.float32 and state[name].eq(2.0).all()


def test_saved_dtypes_survive_in_a_low_precision_model():
    params = parameters(LARGE, torch.bfloat16)
    first = AdamW(params, master_weights=True, ema_decay=0.9)
    steps(first, 3)
    second = AdamW(params)
    second.load_state_dict(first.state_dict())
    for p in params:
        for name, value in first.state[p].items():
            assert second.state[p][name].dtype is torch.float32 and torch.equal(second.state[p][name], value)


def test_a_setting_left_out_of_a_checkpoint_converts_what_is_there():
    params = parameters(LARGE)
    first = AdamW(params, state_dtype="8bit")
    steps(first, 3)
    saved = copy.deepcopy(first.state_dict())
    del saved["param_groups"][0]["state_dtype"]
    second = AdamW(clones(params))
    second.load_state_dict(saved)
    steps(second, 1, first=3)
    steps(first, 1, first=3)
    states = second.state[second.param_groups[0]["params"][0]]
    assert states["exp_avg"].dtype is torch.float32 and "exp_avg_scale" not in states
    for p, q in zip(params, second.param_groups[0]["params"], strict=True):
        assert_close(p, q)


def test_settings_may_be_switched_on_between_steps():
    params = parameters(LARGE, torch.bfloat16)
    optimizer = AdamW(params, lr=0.01)
    steps(optimizer, 2)
    optimizer.param_groups[0].update(amsgrad=True, ema_decay=0.5, state_dtype="bfloat16", master_weights=True)
    steps(optimizer, 1, first=2)
    state = optimizer.state[params[0]]
    assert {name: value.dtype for name, value in state.items()} == {
        "step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16,
        "max_exp_avg_sq": torch.bfloat16, "master": torch.float32, "ema": torch.float32,
    }  # fmt: skip


def test_checkpoints_of_old_torch_with_a_number_for_the_step():
    params = parameters(((3,),))
    optimizer = AdamW(params)
    steps(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 7
    optimizer.load_state_dict(saved)
    steps(optimizer, 1)
    assert optimizer.state[params[0]]["step"].item() == 8


def test_counts_of_steps_are_float32_and_not_shared_with_what_was_loaded():
    first, second = AdamW(parameters(((3,),))), AdamW(parameters(((3,),)))
    steps(first, 1)
    first.state_dict()["state"][0]["step"] = first.state_dict()["state"][0]["step"].double()
    second.load_state_dict(first.state_dict())
    steps(second, 1)
    counts = [next(iter(o.state.values()))["step"] for o in (first, second)]
    assert [c.item() for c in counts] == [1, 2] and counts[1].dtype is torch.float32


def test_mismatched_groups_are_refused_as_in_torch():
    saved = AdamW(parameters(((3,),))).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        AdamW(parameters()).load_state_dict(saved)
