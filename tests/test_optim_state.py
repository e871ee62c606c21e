"""Checkpoints of bigmodel.optim, to and from torch.optim too, and tensors that move under an optimizer."""

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


# --- tensors that move ------------------------------------------------------------------------------------------------


def model_load(model, optimizer):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def model_load_assign(model, optimizer):
    """New parameters in the same module, as torch's tutorials hand them to an optimizer that exists."""
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    for p, new in zip(list(optimizer.param_groups[0]["params"]), model.parameters(), strict=True):
        optimizer.state[new] = optimizer.state.pop(p)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def optimizer_load(model, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, value in state.items():
            if name in ("exp_avg", "sum", "momentum_buffer"):
                value.mul_(2)
    optimizer.load_state_dict(saved)


def to_dtype(model, optimizer):
    model.to(torch.bfloat16)


def data_replaced(model, optimizer):
    for p in model.parameters():
        p.data = p.data * 2


def data_to_channels_last(model, optimizer):
    model.conv.weight.data = model.conv.weight.data.contiguous(memory_format=torch.channels_last)
    for name, value in list(optimizer.state[model.conv.weight].items()):
        if value.dim() == 4:
            optimizer.state[model.conv.weight][name] = value.contiguous(memory_format=torch.channels_last)


def states_moved(model, optimizer):
    """The snippet that moves an optimizer to another device, with a copy in place of the device."""
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone() * 1.5 if value.dim() and value.is_floating_point() else value.clone()


def state_forgotten(model, optimizer):
    for p in model.parameters():
        optimizer.state.pop(p, None)


def ema_swap(model, optimizer):
    if isinstance(optimizer, AdamW):
        with optimizer.ema_weights():
            pass


def gradients_kept(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


MOVES = [
    model_load, model_load_assign, optimizer_load, to_dtype, data_replaced, data_to_channels_last, states_moved,
    state_forgotten, ema_swap, gradients_kept,
]  # fmt: skip


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "linear": nn.Linear(70, 64), "norm": nn.LayerNorm(64)})


@pytest.mark.parametrize("move", MOVES, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, lr=0.1, amsgrad=True, ema_decay=0.9, max_grad_norm=1.0),
        lambda p: AdamW(p, lr=0.1, ema_decay=0.9, state_dtype="8bit"),
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: Adagrad(p, lr=0.1),
    ],
    ids=["AdamW", "8bit", "SGD", "Adagrad"],
)
def test_whatever_moves_after_the_first_step_is_seen_by_the_next(make, move):
    """A copy has no tables yet, so it takes the step as a new optimizer would: both have to give the same bits."""
    model = small_model()
    optimizer = make(model.parameters())
    params = optimizer.param_groups[0]["params"]
    gradient(params, 0)
    optimizer.step()
    optimizer.step()
    old = [(p.data, p.data.clone()) for p in params]
    if move is to_dtype:
        model.zero_grad()
    move(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    assert not other._rows
    for copied, p in zip(twin.parameters(), model.parameters(), strict=True):
        if move is not gradients_kept:
            gradient([p], 1)
        copied.grad = p.grad.clone()  # which deepcopy leaves out
    before = clones(model.parameters())
    optimizer.step()
    other.step()
    assert same_values(model.parameters(), twin.parameters()) and same_state(optimizer, other)
    assert move is gradients_kept or not same_values(before, model.parameters())
    if move in (data_replaced, model_load_assign):
        assert all(torch.equal(data, value) for data, value in old), "memory that was given up must not be written"


def test_gradients_that_replace_others_at_the_same_address_or_another():
    params, stock = parameters(), parameters()
    ours, theirs = AdamW(params, lr=0.1, max_grad_norm=0.5), optim.AdamW(stock, lr=0.1)
    kept = []
    for step in range(4):
        if step % 2:  # the old gradients stay where they are, so that the new ones get other addresses
            kept += [p.grad for p in params]
        gradient(params, step)
        for p, q in zip(params, stock, strict=True):
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(stock, 0.5)
        ours.step()
        theirs.step()
    for p, q in zip(params, stock, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)
def test_gradients_in_another_order_of_memory(cls):
    """A channels_last weight with a contiguous gradient, and a transposed one; each step with new values."""
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4, 3, 3), (5, 6))]
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    stock = clones(ours)
    first, second = cls(ours, lr=0.1), PAIRS[cls](stock, lr=0.1)
    for _ in range(3):
        ours[0].grad, ours[1].grad = torch.randn(8, 4, 3, 3), torch.randn(6, 5).t()
        for p, q in zip(ours, stock, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(ours, stock, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls, options", [
    (AdamW, {"amsgrad": True}), (AdamW, {"ema_decay": 0.9, "state_dtype": "8bit"}), (AdamW, {"master_weights": True}),
    (SGD, {"momentum": 0.9}), (Adagrad, {}),
])  # fmt: skip
def test_a_model_that_becomes_channels_last_between_steps(cls, options):
    """Its states follow; those in 8 bits lie in other blocks then, and are within the 1.4 % of their codes."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    models = [nn.Conv2d(16, 32, 3, dtype=dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [cls(model.parameters(), lr=0.01, **options) for model in models]
    for step in range(4):
        if step == 2:
            models[0].to(memory_format=torch.channels_last)
        for model, optimizer in zip(models, optimizers, strict=True):
            gradient(model.parameters(), step)
            optimizer.step()
    assert models[0].weight.stride() != models[1].weight.stride()
    for name, value in optimizers[0].state[models[0].weight].items():
        assert value.dim() != 4 or value.stride() == models[0].weight.stride(), name
    tolerance = {"rtol": 0.05, "atol": 1e-3} if "state_dtype" in options else {}
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, **tolerance)
