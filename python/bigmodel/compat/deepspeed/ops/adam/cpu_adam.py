"""deepspeed.ops.adam.cpu_adam over bigmodel.optim.Adam."""

from __future__ import annotations

from typing import Any

from bigmodel.compat._bias_correction import BiasCorrected

__all__ = ["DeepSpeedCPUAdam"]


class DeepSpeedCPUAdam(BiasCorrected):
    """deepspeed.ops.adam.DeepSpeedCPUAdam, also for parameters on CUDA.

    Args:
        model_params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in `bigmodel.optim.Adam`.
        bias_correction: False leaves exp_avg and exp_avg_sq as they are; the step then counts from infinity, where both
            corrections are 1.
        amsgrad: as in `bigmodel.optim.Adam`; DeepSpeed accepts it without effect.
        adamw_mode: True for AdamW's decoupled weight decay, False for Adam's.
        fp32_optimizer_states: False keeps exp_avg and exp_avg_sq in the parameter's dtype.
    """

    def __init__(
        self, model_params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
        adamw_mode=True, fp32_optimizer_states=True,
    ) -> None:  # fmt: skip
        super().__init__(
            model_params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=bool(adamw_mode),
            state_dtype="float32" if fp32_optimizer_states else "param",
        )  # fmt: skip
        self.adam_w_mode, self.fp32_optimizer_states = adamw_mode, fp32_optimizer_states
        self._set_bias_correction(bias_correction)

    @classmethod
    def _name(cls) -> str:
        return "deepspeed.ops.adam.DeepSpeedCPUAdam"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("adam_w_mode", "fp32_optimizer_states")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}
