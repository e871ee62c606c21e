"""Settings of parameter groups: checked in every step, and refused where they have no effect."""

from __future__ import annotations

import pytest
import torch
from optim_cases import LARGE, parameters, steps

from bigmodel.optim import EMA, SGD, Adagrad, Adam, AdamW

each_class = pytest.mark.parametrize("cls", [AdamW, Adam, SGD, Adagrad], ids=lambda c: c.__name__)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"state_dtype": "nonsense"}, "state_dtype is 'nonsense'"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5"),
        ({"master_weights": True, "stochastic_rounding": True}, "both True"),
    ],
)
def test_settings_that_are_wrong_between_steps_are_refused(settings, message):
    params = parameters(LARGE, torch.bfloat16)
    optimizer = AdamW(params, ema_decay=0.5)
    for first in (True, False):
        kept = dict(optimizer.param_groups[0])
        optimizer.param_groups[0].update(settings)
        with pytest.raises(ValueError, match=message):
            steps(optimizer, 1)
        with pytest.raises(ValueError, match=message):
            steps(optimizer, 1)
        optimizer.param_groups[0] = kept
        if first:
            steps(optimizer, 1)


@pytest.mark.parametrize(
    "refused, message",
    [
        (
            lambda: AdamW(parameters(), max_grad_norm="1"),
            "AdamW: max_grad_norm must be a number, got str.",
        ),
        (lambda: AdamW(parameters(), ema_decay=True), "AdamW: ema_decay must be a number, got bool."),
        (lambda: EMA(torch.nn.Linear(2, 2), "x"), "EMA: decay must be a number, got str."),
    ],
)
def test_what_is_no_number_is_refused_by_name(refused, message):
    with pytest.raises(TypeError, match=rf"^bigmodel\.optim\.{message}$"):
        refused()


def test_a_dtype_for_the_states_may_be_set_between_steps():
    params = parameters(LARGE)
    optimizer = AdamW(params)
    steps(optimizer, 1)
    optimizer.param_groups[0]["state_dtype"] = torch.uint8
    steps(optimizer, 1)
    assert optimizer.state[params[0]]["exp_avg"].dtype is torch.uint8
    assert optimizer.param_groups[0]["state_dtype"] == "8bit"  # what checkpoints can hold


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite"])
@each_class
def test_settings_that_a_group_cannot_have_are_refused(cls, name):
    with pytest.raises(ValueError, match=f"a parameter group has {name}.*all groups"):
        cls([{"params": parameters(), name: 1.0}], lr=0.1)


@pytest.mark.parametrize("name", ["ema_decay", "state_dtype", "master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("cls", [SGD, Adagrad])
def test_what_only_adam_has_is_refused_elsewhere(cls, name):
    optimizer = cls(parameters(((3,),)), lr=0.1)
    with pytest.raises(ValueError, match=f"a parameter group has {name}"):
        optimizer.add_param_group({"params": parameters(((4,),)), name: 0.5})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["maximize", "skip_nonfinite", "differentiable"])
@each_class
def test_flags_are_bools(cls, name):
    with pytest.raises(TypeError, match=rf"^bigmodel\.optim\.{cls.__name__}: {name} must be a bool, got str\.$"):
        cls(parameters(), lr=0.1, **{name: "x"})


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("cls", [AdamW, Adam])
def test_flags_of_adam_are_bools(cls, name):
    for value in ("no", 1, None):
        if name in ("master_weights", "stochastic_rounding") and value is None:
            continue  # as without it
        with pytest.raises(TypeError, match=f"{name} must be a bool, got"):
            cls(parameters(), **{name: value})
    optimizer = cls(parameters())
    with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
        optimizer.add_param_group({"params": parameters(((4,),)), name: "x"})
    assert len(optimizer.param_groups) == 1


def test_nesterov_is_a_bool():
    with pytest.raises(TypeError, match="SGD: nesterov must be a bool, got str"):
        SGD(parameters(), lr=0.1, momentum=0.9, nesterov="x")


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"max_grad_norm": -1.0}, "a parameter group has max_grad_norm"),
        ({"maximize": "x"}, "maximize must be a bool, got str"),
        ({"differentiable": True}, "differentiable is True"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
        ({"weight_decay": "x"}, "weight_decay must be a number, got str"),
        ({"state_dtype": "8bit"}, "a parameter group has state_dtype"),
    ],
    ids=str,
)
@each_class
def test_settings_of_groups_are_checked_in_every_step(cls, setting, words):
    if cls in (Adam, AdamW) and "state_dtype" in setting:
        pytest.skip("has it")
    params = parameters()
    optimizer = cls(params, lr=0.1)
    optimizer.param_groups[0].update(setting)
    before = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError), match=words):
        steps(optimizer, 1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [-1.0, 0, float("nan"), "1"])
@each_class
def test_what_is_set_on_the_optimizer_is_checked_in_every_step(cls, bad):
    """A negative norm would turn every gradient around."""
    params = parameters()
    optimizer = cls(params, lr=0.1)
    optimizer.max_grad_norm = bad
    before = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError), match="max_grad_norm (is|must be)"):
        steps(optimizer, 1)
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, "x"
    with pytest.raises(TypeError, match="skip_nonfinite must be a bool, got str"):
        steps(optimizer, 1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("cls, name, bad", [(AdamW, "betas", (0.9, 1.5)), (Adam, "eps", -1.0), (SGD, "momentum", -0.5),
                                            (Adagrad, "lr_decay", -1.0)])  # fmt: skip
def test_what_torch_checks_in_constructors_is_checked_in_steps(cls, name, bad):
    optimizer = cls(parameters(), lr=0.1)
    optimizer.param_groups[0][name] = bad
    with pytest.raises(ValueError, match=f"{name} (is|are) .*at least 0"):
        steps(optimizer, 1)
