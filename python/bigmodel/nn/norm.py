"""The normalisations: torch.nn.LayerNorm and RMSNorm through the fused ops."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel import ops


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm through `bigmodel.layer_norm`: its arguments, parameters and state_dict, and the op's options.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
        weight_offset, memory_efficient, out_dtype: as in `bigmodel.layer_norm`.

    Shapes: input (*, *normalized_shape), output the same.
    """

    def __init__(
        self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True,
        device=None, dtype=None, *, weight_offset: float = 0.0, memory_efficient: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.weight_offset = weight_offset
        self.memory_efficient = memory_efficient
        self.out_dtype = out_dtype
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            weight_offset=self.weight_offset, memory_efficient=self.memory_efficient, out_dtype=self.out_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _options(self)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm through `bigmodel.rms_norm`: its arguments, parameters and state_dict, and the op's options.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.nn.RMSNorm.
        weight_offset, memory_efficient, out_dtype: as in `bigmodel.rms_norm`.

    Shapes: input (*, *normalized_shape), output the same.
    """

    def __init__(
        self, normalized_shape, eps: float | None = None, elementwise_affine: bool = True, device=None, dtype=None,
        *, weight_offset: float = 0.0, memory_efficient: bool = False, out_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.weight_offset = weight_offset
        self.memory_efficient = memory_efficient
        self.out_dtype = out_dtype
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            weight_offset=self.weight_offset, memory_efficient=self.memory_efficient, out_dtype=self.out_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _options(self)


def _options(module: torch.nn.Module) -> str:
    defaults = {"weight_offset": 0.0, "memory_efficient": False, "out_dtype": None}
    return "".join(
        f", {name}={getattr(module, name)}" for name, default in defaults.items() if getattr(module, name) != default
    )
