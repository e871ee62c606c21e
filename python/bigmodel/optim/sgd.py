"""Stochastic gradient descent with momentum: torch.optim's, in one pass (csrc/ops/sgd.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel.ops import sgd_
from bigmodel.optim import _state
from bigmodel.optim._batches import Batch
from bigmodel.optim._distributed import local
from bigmodel.optim._optimizer import FusedOptimizer


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD in one pass over memory, with the clipping, skipping and unscaling that AdamW has.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim's.
        foreach, fused: accepted and kept for torch, without effect. differentiable=True is refused.
        max_grad_norm, skip_nonfinite: as in `bigmodel.optim.AdamW`.

    Momentum buffers are float32, float64 for a float64 parameter. With dampening a state has one more key, `started`.

    Raises:
        TypeError: a flag that is no bool; a number that is none.
        ValueError: torch.optim's, with its messages; a parameter twice; differentiable; max_grad_norm not above 0.
        RuntimeError: from `step`, for sparse gradients.
    """

    _flags = ("maximize", "differentiable", "nesterov")
    _least_0 = ("weight_decay", "momentum")

    def __init__(
        self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, *, maximize=False, foreach=None,
        differentiable=False, fused=None, max_grad_norm=None, skip_nonfinite=False,
    ) -> None:  # fmt: skip
        self._configure(differentiable, max_grad_norm, skip_nonfinite)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused
        )

    def _sparse_message(self) -> str:
        return "SGD does not support sparse gradients here, please use torch.optim.SGD instead"

    def _stateful(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _settings(self, group: dict[str, Any]) -> Any:
        return group["momentum"] != 0, group["dampening"] != 0

    def _columns(self, group: dict[str, Any]) -> dict[str, str]:
        if group["momentum"] == 0:
            return {}
        names = {"momentum_buffers": "momentum_buffer"}
        return {**names, "started": "started"} if group["dampening"] != 0 else names

    def _complete(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["momentum"] == 0:
            return
        began = state.get("momentum_buffer") is not None
        _state.conform(state, "momentum_buffer", param, _state.wide(param))
        if group["dampening"] != 0 and "started" not in state:
            state["started"] = torch.full((), float(began), dtype=torch.float32, device=local(param).device)

    def _update(self, batch: Batch, control: dict[str, Any]) -> None:
        group = batch.group
        sgd_(
            batch.params,
            batch.grads,
            **batch.columns,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            cache=batch.cache,
            **control,
        )
