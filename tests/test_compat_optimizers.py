"""bigmodel.compat's FusedAdam and DeepSpeedCPUAdam: signatures, paths and what they compute."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from optim_cases import LARGE, clones, gradient, parameters, same_values, steps
from torch import optim
from torch.testing import assert_close

import bigmodel
from bigmodel.compat.apex.optimizers import FusedAdam
from bigmodel.compat.deepspeed.ops.adam import DeepSpeedCPUAdam

APEX = {
    "params": inspect.Parameter.empty, "lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8,
    "adam_w_mode": True, "weight_decay": 0.0, "amsgrad": False, "set_grad_none": True, "capturable": False,
    "master_weights": False,
}  # fmt: skip
DEEPSPEED = {
    "model_params": inspect.Parameter.empty, "lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8,
    "weight_decay": 0, "amsgrad": False, "adamw_mode": True, "fp32_optimizer_states": True,
}  # fmt: skip
STEP = ["self", "closure", "grads", "output_params", "scale", "grad_norms", "grad_scaler"]
MODE = {FusedAdam: "adam_w_mode", DeepSpeedCPUAdam: "adamw_mode"}
each_class = pytest.mark.parametrize("cls", MODE, ids=lambda c: c.__name__)


def test_signatures_and_paths():
    for cls, expected in ((FusedAdam, APEX), (DeepSpeedCPUAdam, DEEPSPEED)):
        given = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        assert given == expected and list(given) == list(expected)
    assert list(inspect.signature(FusedAdam.step).parameters) == STEP
    assert bigmodel.compat.apex.optimizers.fused_adam.FusedAdam is FusedAdam is bigmodel.compat.apex.FusedAdam
    assert bigmodel.compat.deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam is DeepSpeedCPUAdam


@pytest.mark.parametrize("decoupled", [True, False])
@each_class
def test_both_modes_are_torchs(cls, decoupled):
    ours, stock = parameters(), parameters()
    steps(cls(ours, lr=0.1, weight_decay=0.2, **{MODE[cls]: decoupled}), 5)
    steps((optim.AdamW if decoupled else optim.Adam)(stock, lr=0.1, weight_decay=0.2), 5)
    for p, q in zip(ours, stock, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_class
def test_without_bias_correction_the_moments_are_taken_as_they_are(cls):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = cls([p], lr=0.1, bias_correction=False, eps=0.5)
    m = v = torch.zeros(2)
    w = p.detach().clone()
    for step in range(3):
        gradient([p], step)
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        w = w - 0.1 * m / (v.sqrt() + 0.5)
        optimizer.step()
        assert_close(p.detach(), w)
    assert optimizer.state[p]["step"].item() == math.inf
    twin = torch.nn.Parameter(p.detach().clone())
    resumed = cls([twin], lr=0.1, eps=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(resumed, 1, first=3)
    steps(optimizer, 1, first=3)
    assert torch.equal(p, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_apexs_master_weights_are_kept_for_bfloat16_too(dtype):
    params, by_hand = parameters(dtype=dtype), clones(parameters(dtype=dtype), torch.float32)
    ours, stock = FusedAdam(params, master_weights=True), optim.AdamW(by_hand, weight_decay=0.0)
    for step in range(20):
        gradient(params, step)
        for p, q in zip(params, by_hand, strict=True):
            q.grad = p.grad.float()
        ours.step()
        stock.step()
    for p, q in zip(params, by_hand, strict=True):
        assert_close(ours.state[p]["master"], q.detach(), rtol=1e-5, atol=1e-6)
        assert ours.state[p]["exp_avg"].dtype is torch.float32


def test_set_grad_none():
    for set_grad_none in (True, False):
        params = parameters(((3,),))
        optimizer = FusedAdam(params, set_grad_none=set_grad_none)
        gradient(params, 0)
        optimizer.zero_grad()
        assert (params[0].grad is None) == set_grad_none
        if not set_grad_none:
            assert not params[0].grad.any()


def test_capturable_makes_the_rate_a_tensor_that_is_read_in_each_step():
    params, plain = parameters(), parameters()
    optimizer = FusedAdam([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=0.25, capturable=True)
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.5]
    for group in optimizer.param_groups:
        group["lr"].fill_(0.125)
    steps(optimizer, 2)
    steps(FusedAdam(plain, lr=0.125), 2)
    assert same_values(params, plain)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
@pytest.mark.parametrize("by_hand", [False, True])
def test_apex_takes_the_scaler_as_an_argument(by_hand):
    ours, stock = parameters(), parameters()
    first, second = FusedAdam(ours, lr=0.1), optim.AdamW(stock, lr=0.1, weight_decay=0.0)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(4):
        for params, optimizer, scaler in zip((ours, stock), (first, second), scalers, strict=True):
            gradient(params, step, scale=scaler.scale(torch.ones(())).item())
            if step == 1:
                params[0].grad[0] = math.inf
            if by_hand:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(ours, stock, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not hasattr(first, "found_inf") and first.skipped_steps.item() == 1


def test_arguments_of_step_that_apex_refuses():
    with pytest.raises(RuntimeError, match="takes no grads, output_params, scale or grad_norms"):
        FusedAdam(parameters()).step(scale=2.0)


def test_a_checkpoint_of_apex_with_one_step_for_a_group():
    ours, stock = parameters(((5,), (2, 3))), parameters(((5,), (2, 3)))
    reference = optim.AdamW(stock, lr=0.1, weight_decay=0.0)
    steps(reference, 3)
    states = copy.deepcopy(reference.state_dict()["state"])
    for state in states.values():
        del state["step"]
    group = {
        "lr": 0.1, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 3,
        "params": [0, 1],
    }  # fmt: skip
    optimizer = FusedAdam(ours)
    optimizer.load_state_dict({"state": states, "param_groups": [group]})
    with torch.no_grad():
        for p, q in zip(ours, stock, strict=True):
            p.copy_(q)
    steps(optimizer, 2, first=3)
    steps(reference, 2, first=3)
    for p, q in zip(ours, stock, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_class
def test_foreign_checkpoints_without_bias_correction_go_on_without_it(cls):
    """apex counts for a group and DeepSpeed in integers, and both count from 0."""
    whole, moved = parameters(((5,),)), parameters(((5,),))
    uninterrupted, stopped = (cls(params, lr=0.1, bias_correction=False) for params in (whole, moved))
    steps(uninterrupted, 6)
    steps(stopped, 3)
    saved = copy.deepcopy(stopped.state_dict())
    if cls is FusedAdam:
        del saved["state"][0]["step"]
        saved["param_groups"][0]["step"] = 3
    else:
        saved["state"][0]["step"] = 3
    resumed = cls(moved, lr=0.7)
    resumed.load_state_dict(saved)
    steps(resumed, 3, first=3)
    assert resumed.state[moved[0]]["step"].item() == math.inf
    assert same_values(whole, moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deepspeeds_states_are_float32_or_the_parameters_own(dtype):
    for fp32 in (True, False):
        params = parameters(LARGE, dtype)
        optimizer = DeepSpeedCPUAdam(params, fp32_optimizer_states=fp32)
        steps(optimizer, 1)
        assert optimizer.state[params[0]]["exp_avg"].dtype is (torch.float32 if fp32 else dtype)


@each_class
def test_copies_keep_what_the_class_adds(cls):
    params = parameters(((3,),))
    optimizer = cls(params)
    steps(optimizer, 1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.adam_w_mode == 1 and isinstance(other, optim.Adam)
        own = other.param_groups[0]["params"]
        steps(other, 1, first=1)
        assert not torch.equal(own[0], params[0])
