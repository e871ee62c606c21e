"""Tensors that move under an optimizer between two steps, or are exchanged: the next step has to see it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from optim_cases import clones, gradient, parameters, same_state, same_values, steps
from torch import nn, optim
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from bigmodel.ops import _table
from bigmodel.optim import SGD, Adagrad, Adam, AdamW, _batches

PAIRS = {AdamW: optim.AdamW, Adam: optim.Adam, SGD: optim.SGD, Adagrad: optim.Adagrad}


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


def states_exchanged(model, optimizer):
    one, other = model.norm.weight, model.norm.bias
    state = optimizer.state
    state[one], state[other] = state[other], state[one]


def parameters_in_another_order(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def ema_swap(model, optimizer):
    if isinstance(optimizer, AdamW):
        with optimizer.ema_weights():
            pass


def gradients_kept(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def states_laid_out_anew(model, optimizer):
    """As moving them through numpy does, which has no channels_last."""
    for name, value in optimizer.state[model.conv.weight].items():
        if value.is_floating_point() and value.dim() == 4:
            other = value.transpose(0, 1).contiguous().transpose(0, 1)
            assert other.stride() != value.stride()
            optimizer.state[model.conv.weight][name] = other


def state_in_another_dtype(model, optimizer):
    for state in optimizer.state.values():
        for name in ("exp_avg", "sum", "momentum_buffer"):
            if name in state and state[name].is_floating_point():
                state[name] = state[name].bfloat16()


MOVES = [
    model_load, model_load_assign, optimizer_load, to_dtype, data_replaced, data_to_channels_last, states_moved,
    states_laid_out_anew, state_in_another_dtype, state_forgotten, states_exchanged, parameters_in_another_order,
    ema_swap, gradients_kept,
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


@pytest.mark.parametrize("cls", [AdamW, SGD, Adagrad])
def test_new_gradients_alone_need_neither_a_new_table_nor_a_walk_over_the_states(cls, monkeypatch):
    """500 small tensors take four times as long with them."""
    params = parameters()
    optimizer = cls(params, lr=0.1)
    steps(optimizer, 2)
    for owner, name in ((_table, "build"), (_batches.Rows, "complete"), (cls, "_complete")):
        monkeypatch.setattr(owner, name, lambda *arguments: pytest.fail("nothing but gradients has changed"))
    kept = [p.grad for p in params]  # so that the new ones get other addresses
    before = clones(params)
    steps(optimizer, 1, first=2)
    assert all(g is not p.grad for g, p in zip(kept, params, strict=True)) and not same_values(before, params)


@pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)
def test_states_that_are_replaced_give_their_memory_back(cls):
    """What offloading them between two steps is for."""
    params = parameters()
    optimizer = cls(params, lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    steps(optimizer, 3)
    old = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})
    assert old and not any(ref() is not None for ref in old)


def test_states_that_are_dropped_are_gone_before_there_are_new_ones(monkeypatch):
    params = parameters()
    optimizer = AdamW(params, lr=0.1)
    steps(optimizer, 3)
    old = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    optimizer.state.clear()
    alive, complete = [], AdamW._complete
    monkeypatch.setattr(AdamW, "_complete", lambda *arguments: (alive.extend(r() for r in old), complete(*arguments)))
    steps(optimizer, 1)
    assert alive and not any(value is not None for value in alive)


def test_a_parameter_that_takes_over_a_state_is_not_lost_under_its_master():
    """Though it has been written to as often as the one before it."""
    old = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = AdamW([old], lr=0.1, weight_decay=0, master_weights=True)
    steps(optimizer, 2)
    new = nn.Parameter(torch.full((8,), 5.0, dtype=torch.bfloat16))
    while new._version < old._version:
        torch.autograd.graph.increment_version([new])
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"] = [new]
    steps(optimizer, 1)
    assert (new > 4).all()


class Wrapped(torch.Tensor):
    """A tensor without memory of its own around another, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, cls) else value

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, out)


@pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)
def test_tensors_without_memory_beside_plain_ones(cls):
    """They get where torch's dispatcher sends them; a state among plain ones is refused. Neither is address 0."""
    inner = torch.zeros(6)
    params = [nn.Parameter(torch.zeros(6)), nn.Parameter(Wrapped(inner))]
    optimizer = cls(params, lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    params[0].grad, params[1].grad = torch.ones(6), Wrapped(torch.ones(6))
    optimizer.step()
    assert torch.equal(inner, params[0]) and (inner < 0).all()
    optimizer = cls(params[:1], lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    optimizer.step()
    (state,) = optimizer.state.values()
    (name,) = {"exp_avg", "sum", "momentum_buffer"} & state.keys()
    state[name] = Wrapped(state[name])
    with pytest.raises(TypeError, match=r"\[0\] must be a plain tensor, got a Wrapped without memory"):
        optimizer.step()


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
