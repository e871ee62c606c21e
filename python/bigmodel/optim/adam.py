"""Adam and AdamW: torch.optim's, with everything that a step does around the update in one pass (csrc/ops/adam.h)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigmodel import _check
from bigmodel.ops import adam_
from bigmodel.optim import _state
from bigmodel.optim._batches import Batch, Rows
from bigmodel.optim._distributed import is_dtensor, local
from bigmodel.optim._optimizer import EXTRAS, Control, FusedOptimizer

_ARGUMENTS = """
    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: torch.optim's. lr may be a tensor, which is
            read on its device. Betas that are tensors must be on the CPU.
        foreach, fused: accepted and kept for torch, without effect: there is one implementation. differentiable=True is
            refused.
        max_grad_norm: clips the gradients' global norm to this inside the step, as torch.nn.utils.clip_grad_norm_ would
            before it, and leaves `.grad` as it is; inf only measures. `optimizer.grad_norm` is the norm.
        skip_nonfinite: a step whose norm is infinite or NaN changes nothing; `optimizer.skipped_steps` counts them.
        ema_decay: keeps an exponential moving average of the weights, `ema = ema + (1 - ema_decay) * (weight - ema)`,
            that starts as the weights; see `ema_weights`. float32, float64 for a float64 parameter.
        state_dtype: of exp_avg and exp_avg_sq. "float32" (float64 for a float64 parameter); "bfloat16"; "8bit", which
            is 256 codes for blocks of 256 elements, and float32 for parameters of less than 4096; or "param", the
            parameter's own, as torch has it. torch.float32, torch.bfloat16 and torch.uint8 are accepted too.
        master_weights: keeps float32 copies of bfloat16 and float16 parameters and updates those; wider parameters need
            none. A parameter that something else writes to (but not through `.data`) is taken over into its copy.
        stochastic_rounding: rounds bfloat16 and float16 parameters up with the probability of the part that is cut off.
            Bits depend on the step and the place of an element, not on torch's generators, so replicas stay equal.

    All of them but max_grad_norm and skip_nonfinite may differ between groups. Parameters and gradients: float32,
    bfloat16, float16 or float64, in any mix; dense; DTensors.

    Raises:
        TypeError: a flag that is no bool; a number that is none.
        ValueError: torch.optim's, with its messages; a parameter twice; differentiable; max_grad_norm not above 0;
            ema_decay outside [0, 1); another state_dtype; master_weights together with stochastic_rounding.
        RuntimeError: from `step`, for sparse gradients.
"""


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and not value.is_cpu:
        raise ValueError(f"bigmodel.optim: {name} is a tensor on '{value.device}'; it must be a number or on the CPU.")
    return float(value)


class _Adam(FusedOptimizer):
    _extras = EXTRAS
    _flags = (
        "maximize", "differentiable", "amsgrad", "capturable", "master_weights", "stochastic_rounding",
        "decoupled_weight_decay",
    )  # fmt: skip
    _least_0 = ("weight_decay", "eps")
    _decoupled = False

    def _options(self, ema_decay, state_dtype, master_weights, stochastic_rounding) -> dict[str, Any]:
        name = _state.format_name(self._name(), state_dtype)
        return {
            "ema_decay": ema_decay,
            "state_dtype": None if name == "float32" else name,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for beta in group["betas"]:
            if not isinstance(beta, Tensor) and not 0.0 <= _check.real(self._name(), "a beta", beta) < 1.0:
                raise ValueError(f"{self._name()}: betas are {group['betas']}; they must be at least 0 and below 1.")
        decay = group.get("ema_decay")
        if decay is not None and not 0.0 <= _check.real(self._name(), "ema_decay", decay) < 1.0:
            raise ValueError(f"{self._name()}: ema_decay is {decay}; it must be at least 0 and below 1, or None.")
        if "state_dtype" in group:
            group["state_dtype"] = _state.format_name(self._name(), group["state_dtype"])
        if group.get("master_weights") and group.get("stochastic_rounding"):
            raise ValueError(
                f"{self._name()}: master_weights and stochastic_rounding are both True; a float32 copy loses nothing "
                "that rounding could keep, so take one of them."
            )

    def _check_step(self) -> None:
        if "_weights" in self.__dict__:
            raise RuntimeError(f"{self._name()}: step() was called inside ema_weights(); leave it first.")
        check = getattr(self, "_accelerator_graph_capture_health_check", None)  # its name since torch 2.9
        (check or self._cuda_graph_capture_health_check)()

    # --- states ---------------------------------------------------------------------------------------------------

    def _first_step(self, group: dict[str, Any]) -> float:
        """What steps are counted from; from infinity there is no bias correction."""
        return 0.0

    def _settings(self, group: dict[str, Any]) -> Any:
        get = group.get
        return group["amsgrad"], get("ema_decay") is None, get("state_dtype"), bool(get("master_weights"))

    def _columns(self, group: dict[str, Any]) -> dict[str, str]:
        names = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "steps": "step"}
        if group["amsgrad"]:
            names["max_exp_avg_sqs"] = "max_exp_avg_sq"
        if group.get("ema_decay") is not None:
            names["emas"] = "ema"
        if group.get("master_weights"):
            names["masters"] = "master"
        if group.get("state_dtype") == "8bit":
            names.update(exp_avg_scales="exp_avg_scale", exp_avg_sq_scales="exp_avg_sq_scale")
        return names

    def _complete(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "step" not in state:
            state["step"] = torch.full((), self._first_step(group), dtype=torch.float32, device=local(param).device)
        dtype = _state.moment_dtype(param, group.get("state_dtype", "float32"))
        _state.conform(state, "exp_avg", param, dtype)
        _state.conform(state, "exp_avg_sq", param, dtype)
        if group["amsgrad"]:
            _state.conform(state, "max_exp_avg_sq", param, _state.wide(param) if dtype is torch.uint8 else dtype)
        if self._wants_master(param, group):
            if "master" not in state:
                state["master"] = _state.copy_of(param, torch.float32)
            _state.conform(state, "master", param, torch.float32)
        else:
            state.pop("master", None)
        if group.get("ema_decay") is not None:
            if "ema" not in state:
                state["ema"] = _state.copy_of(state.get("master", param), _state.wide(param))
            _state.conform(state, "ema", param, _state.wide(param))

    @staticmethod
    def _wants_master(param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group.get("master_weights")) and param.dtype in _state.LOW

    def _missing(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[str]:
        missing = (
            ["average of the weights ('ema')"] if group.get("ema_decay") is not None and "ema" not in state else []
        )
        if self._wants_master(param, group) and "master" not in state:
            missing.append("float32 copy of low-precision weights ('master')")
        return missing

    @staticmethod
    def _follow_writes(batch: Batch, rows: Rows, masters: list[Tensor | None]) -> None:
        """Takes over what others wrote to a parameter since the last step, which would be lost under its master."""
        versions = [p._version for p in batch.params]
        for row, (param, master) in enumerate(zip(batch.params, masters, strict=True)):
            if master is not None and (rows.versions is None or rows.versions[row] != versions[row]):
                master.copy_(torch.where(master.to(param.dtype) == param, master, param))

    def _update(self, batch: Batch, control: dict[str, Any]) -> None:
        group, rows, masters = batch.group, self._rows[batch.key], batch.columns.get("masters")
        get = group.get
        if masters:
            self._follow_writes(batch, rows, masters)
        index, _, spread = batch.key
        seed = (index << 32) + (spread.part if spread is not None else 0) if get("stochastic_rounding") else None
        beta1, beta2 = group["betas"]
        adam_(
            batch.params,
            batch.grads,
            **batch.columns,
            lr=group["lr"],
            beta1=_number("beta1", beta1),
            beta2=_number("beta2", beta2),
            eps=group["eps"],
            weight_decay=_number("weight_decay", group["weight_decay"]),
            decoupled=group.get("decoupled_weight_decay", self._decoupled),
            maximize=group["maximize"],
            ema_decay=get("ema_decay") or 0.0,
            seed=seed,
            cache=batch.cache,
            **control,
        )
        if masters:
            rows.versions = [p._version for p in batch.params]

    # --- the average of the weights -------------------------------------------------------------------------------

    def _update_idle(self, idle: list[tuple[dict, Tensor]], control: Control) -> None:
        """The averages of parameters that have no gradient in this step go on towards them."""
        for group, param in idle:
            state = self.state.get(param)
            if state and "ema" in state and group.get("ema_decay") is not None:
                ema = local(state["ema"])
                weight: Any = 1 - group["ema_decay"]
                if control.skip is not None:
                    weight = torch.where(control.skip.to(ema.device) != 0, 0.0, weight)
                ema.add_((local(state.get("master", param)).to(ema.dtype) - ema) * weight)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Has the averages in the parameters inside the `with`, and the weights again after it, bit for bit.

        The values are exchanged in place, by a copy of the weights, so that DDP, FSDP2, CUDA graphs and torch.compile
        see them. Parameters without an average (frozen, or never stepped) stay. Steps are refused inside; what else is
        written to the parameters there is lost. FSDP2 keeps gathered weights of the root module after a forward pass:
        call `model.reshard()` at the end of the `with`.

        Raises:
            RuntimeError: inside itself.
            ValueError: no group has an ema_decay.
        """
        if "_weights" in self.__dict__:
            raise RuntimeError(f"{self._name()}: ema_weights() was called inside ema_weights().")
        groups = [group for group in self.param_groups if group.get("ema_decay") is not None]
        if not groups:
            raise ValueError(f"{self._name()}: ema_weights() needs ema_decay, which no parameter group has.")
        averaged = [p for group in groups for p in group["params"] if "ema" in self.state.get(p, ())]
        self._weights = [(p, local(p).detach().clone()) for p in averaged]
        try:
            with torch.no_grad():
                for p in averaged:
                    local(p).copy_(local(self.state[p]["ema"]))
            yield
        finally:
            with torch.no_grad():
                for p, weight in self._weights:
                    local(p).copy_(weight)
            del self._weights

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _loaded(self, saved: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Steps of other libraries are finite without bias correction too."""
        loaded = super()._loaded(saved, groups)
        for group in groups:
            if self._first_step(group) == math.inf:
                for param in group["params"]:
                    if "step" in loaded["state"].get(param, ()):
                        loaded["state"][param]["step"].fill_(math.inf)
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and loadable there: keys that torch has none of (ema, master, scales) are beside its own.

        8-bit moments of DTensors are given as float32, from which any number of processes can take their shards.
        """
        packed = super().state_dict()
        packed["state"] = {key: self._reshardable(state) for key, state in packed["state"].items()}
        return packed

    @staticmethod
    def _reshardable(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        coded = [name for name in _state.SIGNED if f"{name}_scale" in state and is_dtensor(state[name])]
        if not coded:
            return state
        floats = {name: _state.decoded(state, name) for name in coded}
        scales = {f"{name}_scale" for name in coded}
        return {name: floats.get(name, value) for name, value in state.items() if name not in scales}


class Adam(_Adam, torch.optim.Adam):
    __doc__ = f"torch.optim.Adam (weight decay as an L2 penalty) in one pass over memory.\n{_ARGUMENTS}"

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
        maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
        max_grad_norm=None, skip_nonfinite=False, ema_decay=None, state_dtype="float32", master_weights=False,
        stochastic_rounding=False,
    ) -> None:  # fmt: skip
        options = self._options(ema_decay, state_dtype, master_weights, stochastic_rounding)
        options["decoupled_weight_decay"] = decoupled_weight_decay
        self._configure(differentiable, max_grad_norm, skip_nonfinite, **options)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused,
        )  # fmt: skip


class AdamW(_Adam, torch.optim.AdamW):
    __doc__ = f"torch.optim.AdamW (decoupled weight decay) in one pass over memory.\n{_ARGUMENTS}"
    _decoupled = True

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
        foreach=None, capturable=False, differentiable=False, fused=None, max_grad_norm=None, skip_nonfinite=False,
        ema_decay=None, state_dtype="float32", master_weights=False, stochastic_rounding=False,
    ) -> None:  # fmt: skip
        options = self._options(ema_decay, state_dtype, master_weights, stochastic_rounding)
        self._configure(differentiable, max_grad_norm, skip_nonfinite, **options)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused,
        )  # fmt: skip
