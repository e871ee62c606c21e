"""An exponential moving average of a model's weights, beside any optimizer."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel import _check
from bigmodel.ops import TableCache, ema_
from bigmodel.optim import _state
from bigmodel.optim._distributed import local

_OWNER = "bigmodel.optim.EMA"


def _checked(decay: Any) -> float:
    if not 0.0 <= _check.real(_OWNER, "decay", decay) < 1.0:
        raise ValueError(f"{_OWNER}: decay is {decay}; it must be at least 0 and below 1.")
    return decay


class EMA:
    """Keeps `average = average + (1 - decay) * (weight - average)` of every parameter that requires a gradient.

    `bigmodel.optim.AdamW(..., ema_decay=...)` does the same in the pass of its update.

        ema = bigmodel.optim.EMA(model, 0.999)
        ...
        optimizer.step()
        ema.update()
        ...
        with ema.weights():
            evaluate(model)

    Averages start as the weights, and are float32, float64 for a float64 parameter, with DTensors' placements. Buffers
    (the statistics of a BatchNorm) stay the model's own. A parameter that requires a gradient later joins in the next
    update.

    Args:
        model: whose parameters are averaged.
        decay: how much of the average each update keeps, from 0 to below 1.

    Attributes:
        decay: may be changed between updates.
        averages: by parameter name.

    Raises:
        TypeError: model is no module, or decay no number.
        ValueError: decay is not in that range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_OWNER}: model must be a torch.nn.Module, got {_check.kind(model)}.")
        self.model, self.decay = model, _checked(decay)
        self.averages: dict[str, Tensor] = {}
        self._caches: dict[torch.device, TableCache] = defaultdict(TableCache)
        self._swapped = False
        self._parameters()

    def _parameters(self) -> list[tuple[Tensor, Tensor]]:
        """Every average with its parameter; new ones start here."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, param in self.model.named_parameters():
            if name not in self.averages and param.requires_grad:
                self.averages[name] = _state.copy_of(param, _state.wide(param))
            if name in self.averages:
                if local(self.averages[name]).device != local(param).device:
                    self.averages[name] = self.averages[name].to(param.device)
                pairs.append((self.averages[name], param))
        return pairs

    @torch.compiler.disable
    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights; call it after each step.

        Raises:
            RuntimeError: inside `weights()`.
            TypeError, ValueError: a decay that has been set is not in its range.
        """
        if self._swapped:
            raise RuntimeError("bigmodel.optim.EMA: update() was called inside weights(); leave it first.")
        _checked(self.decay)
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for average, param in self._parameters():
            averages, values = by_device.setdefault(local(param).device, ([], []))
            averages.append(local(average))
            values.append(local(param))
        for device, (averages, values) in by_device.items():
            ema_(averages, values, self.decay, cache=self._caches[device])

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Has the averages in the model inside the `with`, and the weights again after it, bit for bit.

        What else is written to the parameters inside is lost. See `AdamW.ema_weights` for FSDP2.
        """
        if self._swapped:
            raise RuntimeError("bigmodel.optim.EMA: weights() was called inside weights().")
        with torch.no_grad():
            pairs = [(local(average), local(param)) for average, param in self._parameters()]
            kept = [param.clone() for _, param in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for average, param in pairs:
                    param.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (_, param), weight in zip(pairs, kept, strict=True):
                    param.copy_(weight)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """{"decay", "averages": by parameter name}."""
        return {"decay": self.decay, "averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes decay and averages from a state_dict; parameters that it does not have keep the averages they have.

        Raises:
            TypeError: an average is no floating-point tensor, or decay no number.
            ValueError: it has averages for parameters that the model does not have, or of another shape; decay is not
                in its range.
        """
        params = dict(self.model.named_parameters())
        if not isinstance(state_dict, Mapping) or not {"decay", "averages"} <= set(state_dict):
            raise ValueError(f"{_OWNER}: what is loaded must have 'decay' and 'averages', as state_dict() gives them.")
        unknown = sorted(set(state_dict["averages"]) - set(params))
        if unknown:
            raise ValueError(f"{_OWNER}: what is loaded has {unknown[0]!r}, which the model does not have.")
        for name, value in state_dict["averages"].items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, Tensor) else _check.kind(value)
                raise TypeError(f"{_OWNER}: the average of {name!r} must be a floating-point tensor, got {what}.")
            if value.shape != params[name].shape:
                raise ValueError(
                    f"{_OWNER}: the average of {name!r} has shape {tuple(value.shape)}, but the parameter has "
                    f"{tuple(params[name].shape)}."
                )
        self.decay = _checked(state_dict["decay"])
        for name, value in state_dict["averages"].items():
            value = _state.restored(params[name], "ema", value)
            self.averages[name] = _state.copy_of(value, _state.wide(params[name]))
