"""The normalisations: torch.nn.LayerNorm and RMSNorm through the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel import _check, ops
from bigmodel.ops._norm_checks import check_module


class _Options:
    """What the modules have beside torch.nn's: the ops' options."""

    weight: Any
    weight_offset: float
    memory_efficient: bool
    out_dtype: torch.dtype | None

    def _configure(self, normalized_shape, eps, affine, weight_offset, memory_efficient, out_dtype) -> None:
        check_module(
            type(self).__name__, normalized_shape, eps, weight_offset, memory_efficient, out_dtype, bool(affine)
        )
        self.weight_offset, self.memory_efficient, self.out_dtype = weight_offset, memory_efficient, out_dtype

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def extra_repr(self) -> str:
        defaults = {"weight_offset": 0.0, "memory_efficient": False, "out_dtype": None}
        own = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in own.items())  # type: ignore[misc]


class LayerNorm(_Options, torch.nn.LayerNorm):
    """torch.nn.LayerNorm through `bigmodel.layer_norm`: its arguments, parameters and state_dict, and the op's options.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
        weight_offset, memory_efficient, out_dtype: as in `bigmodel.layer_norm`.

    Shapes: input (*, *normalized_shape), output the same.

    Raises:
        TypeError, ValueError: an argument that `bigmodel.layer_norm` would refuse, in the constructor already.
    """

    def __init__(
        self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True,
        device=None, dtype=None, *, weight_offset: float = 0.0, memory_efficient: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        _check.number(type(self).__name__, "eps", eps)
        self._configure(normalized_shape, eps, elementwise_affine, weight_offset, memory_efficient, out_dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            weight_offset=self.weight_offset, memory_efficient=self.memory_efficient, out_dtype=self.out_dtype,
        )  # fmt: skip


class RMSNorm(_Options, torch.nn.RMSNorm):
    """torch.nn.RMSNorm through `bigmodel.rms_norm`: its arguments, parameters and state_dict, and the op's options.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.nn.RMSNorm.
        weight_offset, memory_efficient, out_dtype: as in `bigmodel.rms_norm`.

    Shapes: input (*, *normalized_shape), output the same.

    Raises:
        TypeError, ValueError: an argument that `bigmodel.rms_norm` would refuse, in the constructor already.
    """

    def __init__(
        self, normalized_shape, eps: float | None = None, elementwise_affine: bool = True, device=None, dtype=None,
        *, weight_offset: float = 0.0, memory_efficient: bool = False, out_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._configure(normalized_shape, eps, elementwise_affine, weight_offset, memory_efficient, out_dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            weight_offset=self.weight_offset, memory_efficient=self.memory_efficient, out_dtype=self.out_dtype,
        )  # fmt: skip
