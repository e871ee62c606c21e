"""Adagrad: torch.optim's, in one pass (csrc/ops/adagrad.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel.ops import adagrad_
from bigmodel.optim import _state
from bigmodel.optim._batches import Batch
from bigmodel.optim._distributed import local
from bigmodel.optim._optimizer import FusedOptimizer


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad in one pass over memory, with the clipping, skipping and unscaling that AdamW has.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: torch.optim's.
        foreach, fused: accepted and kept for torch, without effect. differentiable=True is refused.
        max_grad_norm, skip_nonfinite: as in `bigmodel.optim.AdamW`.

    Sums are float32, float64 for a float64 parameter.

    Raises:
        TypeError: a flag that is no bool; a number that is none.
        ValueError: torch.optim's, with its messages; a parameter twice; differentiable; max_grad_norm not above 0.
        RuntimeError: from `step`, for sparse gradients.
    """

    _least_0 = ("weight_decay", "lr_decay", "eps")

    def __init__(
        self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, foreach=None, *,
        maximize=False, differentiable=False, fused=None, max_grad_norm=None, skip_nonfinite=False,
    ) -> None:  # fmt: skip
        self._configure(differentiable, max_grad_norm, skip_nonfinite)
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize, fused=fused
        )

    def _sparse_message(self) -> str:
        return "Adagrad does not support sparse gradients here, please use torch.optim.Adagrad instead"

    def _complete(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        step = state.get("step", 0.0)
        state["step"] = torch.as_tensor(step, dtype=torch.float32).to(local(param).device)
        _state.conform(state, "sum", param, _state.wide(param), group["initial_accumulator_value"])

    def _columns(self, group: dict[str, Any]) -> dict[str, str]:
        return {"sums": "sum", "steps": "step"}

    def _update(self, batch: Batch, control: dict[str, Any]) -> None:
        group = batch.group
        adagrad_(
            batch.params,
            batch.grads,
            **batch.columns,
            lr=group["lr"],
            lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            cache=batch.cache,
            **control,
        )
