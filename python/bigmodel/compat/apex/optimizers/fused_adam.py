"""apex.optimizers.fused_adam over bigmodel.optim.Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from bigmodel.compat._bias_correction import BiasCorrected
from bigmodel.compat.apex._absent import attributes_of

__all__ = ["FusedAdam"]
__getattr__ = attributes_of(__name__)


class FusedAdam(BiasCorrected):
    """apex.optimizers.FusedAdam on CPU and CUDA.

    Args:
        params, lr, betas, eps, weight_decay: as in `bigmodel.optim.Adam`.
        bias_correction: False leaves exp_avg and exp_avg_sq as they are; the step then counts from infinity, where both
            corrections are 1.
        adam_w_mode: True for AdamW's decoupled weight decay, False for Adam's.
        amsgrad: as in `bigmodel.optim.Adam`; apex has none.
        set_grad_none: whether `zero_grad` drops the gradients or fills them with zeros.
        capturable: the learning rates become tensors on the parameters' device.
        master_weights: float32 copies of float16 and bfloat16 parameters, with capturable and without. They are
            `optimizer.state[p]["master"]`, and are saved; apex leaves bfloat16 without, and does not save them.

    Moments are float32. Checkpoints of apex, with one step count for a group, can be loaded.
    """

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, capturable=capturable,
            decoupled_weight_decay=bool(adam_w_mode), master_weights=master_weights,
        )  # fmt: skip
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none, self.capturable, self.master_weights = set_grad_none, capturable, master_weights
        self._set_bias_correction(bias_correction)
        for group in self.param_groups:
            if capturable and group["params"]:
                lr = torch.as_tensor(group["lr"], dtype=torch.float32)
                group["lr"] = lr.to(group["params"][0].device, copy=True)

    @classmethod
    def _name(cls) -> str:
        return "apex.optimizers.FusedAdam"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("adam_w_mode", "set_grad_none", "capturable", "master_weights")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """As torch's; `set_to_none` is `set_grad_none` unless it is given."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        """One step; torch.amp.GradScaler passes itself as `grad_scaler`.

        Raises:
            RuntimeError: for `grads`, `output_params`, `scale` and `grad_norms`, which apex refuses too.
        """
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam.step takes no grads, output_params, scale or grad_norms; call step().")
        if grad_scaler is None:
            return self._step(closure)
        state = grad_scaler._per_optimizer_states[id(self)]
        unscaled = state["stage"] is OptState.UNSCALED
        found = state["found_inf_per_device"] if unscaled else grad_scaler._check_inf_per_device(self)
        factor = grad_scaler._get_scale_async()
        self.found_inf = sum(value.to(factor.device, non_blocking=True) for value in found.values())
        self.grad_scale = None if unscaled else factor
        try:
            return self._step(closure)
        finally:
            del self.found_inf, self.grad_scale

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `bigmodel.optim.Adam`'s; apex's own, whose groups hold the step, too."""
        counts = {
            key: group["step"]
            for group in state_dict["param_groups"]
            if "step" in group
            for key in group["params"]
        }  # fmt: skip
        if counts:
            groups = [{k: v for k, v in group.items() if k != "step"} for group in state_dict["param_groups"]]
            states = {
                key: {"step": self._count(counts[key]), **state} if key in counts else state
                for key, state in state_dict["state"].items()
            }
            state_dict = {**state_dict, "state": states, "param_groups": groups}
        super().load_state_dict(state_dict)

    @staticmethod
    def _count(step: int | Tensor) -> float:
        return float(step)
