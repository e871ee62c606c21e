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
