"""apex.normalization.fused_layer_norm: its modules, functions and autograd Function names over bigmodel's norms.

    layer norm:  out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba, Kiros, Hinton, arXiv 1607.06450)
    RMS norm:    out = x / sqrt(mean(x^2) + eps) * weight                        (Zhang, Sennrich, arXiv 1910.07467)

over the trailing dimensions `normalized_shape`, for float32, bfloat16, float16 and float64 on CPU and CUDA; the
output has the input's shape and device. Plain forms return the input's dtype, mixed forms the weight's. Under
autocast every float32, bfloat16 or float16 argument of a function or module is first cast to the autocast dtype, as
apex does. TypeError and ValueError are those of bigmodel.layer_norm and bigmodel.rms_norm.

`memory_efficient=True` keeps the output instead of the input for the backward pass (limits: docs/numerics.md).
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, init

from bigmodel import _check
from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex._autocast_utils import _autocast_enabled, _cast_if_autocast_enabled
from bigmodel.ops import layer_norm, rms_norm
from bigmodel.ops._norm_checks import check_module

__all__ = [
    "FusedLayerNorm",
    "FusedLayerNormAffineFunction",
    "FusedLayerNormAffineMixedDtypesFunction",
    "FusedLayerNormFunction",
    "FusedRMSNorm",
    "FusedRMSNormAffineFunction",
    "FusedRMSNormAffineMixedDtypesFunction",
    "FusedRMSNormFunction",
    "MixedFusedLayerNorm",
    "MixedFusedRMSNorm",
    "fused_layer_norm",
    "fused_layer_norm_affine",
    "fused_rms_norm",
    "fused_rms_norm_affine",
    "manual_rms_norm",
    "mixed_dtype_fused_layer_norm_affine",
    "mixed_dtype_fused_rms_norm_affine",
]
__getattr__ = attributes_of(__name__)

Shape = int | Sequence[int]

# --- names of apex's autograd Functions -------------------------------------------------------------------------------


class _Function:
    """What apex calls a torch.autograd.Function; here a plain class, so that torch.compile sees only bigmodel's op.

    `apply` takes the arguments of `forward` after `ctx` and returns a tensor that carries bigmodel's own gradient;
    it does not cast under autocast. `forward` is public because callers inspect its parameters; it makes no use of
    `ctx`, and there is no separate `backward`.
    """

    forward: Callable[..., Tensor]

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        device_type = args[0].device.type
        if not _autocast_enabled(device_type):
            return cls.forward(None, *args)
        with torch.autocast(device_type, enabled=False):
            return cls.forward(None, *args)


class FusedLayerNormFunction(_Function):
    @staticmethod
    def forward(ctx, input: Tensor, normalized_shape: Shape, eps: float, memory_efficient: bool = False) -> Tensor:
        return layer_norm(input, normalized_shape, None, None, eps, memory_efficient=memory_efficient)


class FusedLayerNormAffineFunction(_Function):
    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Shape,
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        return layer_norm(input, normalized_shape, weight, bias, eps, memory_efficient=memory_efficient)


class FusedLayerNormAffineMixedDtypesFunction(FusedLayerNormAffineFunction):
    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Shape,
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        return layer_norm(
            input, normalized_shape, weight, bias, eps, memory_efficient=memory_efficient, out_dtype=weight.dtype
        )


class FusedRMSNormFunction(_Function):
    @staticmethod
    def forward(ctx, input: Tensor, normalized_shape: Shape, eps: float, memory_efficient: bool = False) -> Tensor:
        return rms_norm(input, normalized_shape, None, eps, memory_efficient=memory_efficient)


class FusedRMSNormAffineFunction(_Function):
    @staticmethod
    def forward(
        ctx, input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float, memory_efficient: bool = False
    ) -> Tensor:
        return rms_norm(input, normalized_shape, weight, eps, memory_efficient=memory_efficient)


class FusedRMSNormAffineMixedDtypesFunction(FusedRMSNormAffineFunction):
    @staticmethod
    def forward(
        ctx, input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float, memory_efficient: bool = False
    ) -> Tensor:
        return rms_norm(input, normalized_shape, weight, eps, memory_efficient=memory_efficient, out_dtype=weight.dtype)


# --- functions --------------------------------------------------------------------------------------------------------


def fused_layer_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """Layer norm without weight and bias; returns the input's dtype."""
    return FusedLayerNormFunction.apply(*_cast_if_autocast_enabled(input, normalized_shape, eps, memory_efficient))


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Layer norm with `weight` and `bias` of shape `normalized_shape`; returns the input's dtype."""
    args = _cast_if_autocast_enabled(input, weight, bias, normalized_shape, eps, memory_efficient)
    return FusedLayerNormAffineFunction.apply(*args)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Layer norm with `weight` and `bias` of shape `normalized_shape`; returns the weight's dtype."""
    args = _cast_if_autocast_enabled(input, weight, bias, normalized_shape, eps, memory_efficient)
    return FusedLayerNormAffineMixedDtypesFunction.apply(*args)


def fused_rms_norm(input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """RMS norm without weight; returns the input's dtype."""
    return FusedRMSNormFunction.apply(*_cast_if_autocast_enabled(input, normalized_shape, eps, memory_efficient))


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMS norm with `weight` of shape `normalized_shape`; returns the input's dtype."""
    args = _cast_if_autocast_enabled(input, weight, normalized_shape, eps, memory_efficient)
    return FusedRMSNormAffineFunction.apply(*args)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMS norm with `weight` of shape `normalized_shape`; returns the weight's dtype."""
    args = _cast_if_autocast_enabled(input, weight, normalized_shape, eps, memory_efficient)
    return FusedRMSNormAffineMixedDtypesFunction.apply(*args)


def manual_rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm with the dtype that apex's unfused reference returns.

    That is a bfloat16 or float16 weight's dtype, else the widest of float32, the input's and the weight's.
    """
    out_dtype = torch.promote_types(input.dtype, torch.float32)
    if weight is not None:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        out_dtype = weight.dtype if half else torch.promote_types(out_dtype, weight.dtype)
    return rms_norm(input, normalized_shape, weight, eps, out_dtype=out_dtype)


# --- modules ----------------------------------------------------------------------------------------------------------


class _FusedNorm(torch.nn.Module):
    def __init__(self, normalized_shape: Shape, eps: float, elementwise_affine: bool, memory_efficient: bool) -> None:
        super().__init__()
        check_module(type(self).__name__, normalized_shape, eps, 0.0, memory_efficient, None, elementwise_affine)
        _check.flag(type(self).__name__, "elementwise_affine", elementwise_affine)
        if isinstance(normalized_shape, numbers.Integral):
            normalized_shape = (int(normalized_shape),)
        self.normalized_shape = torch.Size(normalized_shape)  # type: ignore[arg-type]
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.memory_efficient = memory_efficient

    def _register(self, *names: str) -> None:
        for name in names:
            parameter = Parameter(torch.empty(self.normalized_shape)) if self.elementwise_affine else None
            self.register_parameter(name, parameter)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_FusedNorm):
    """Layer norm over the trailing dimensions `normalized_shape`; returns the input's dtype.

    Parameters `weight` and `bias` of that shape, ones and zeros, unless `elementwise_affine` is False.
    """

    weight: Parameter
    bias: Parameter

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient)
        self._register("weight", "bias")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            init.ones_(self.weight)
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if not self.elementwise_affine:
            return fused_layer_norm(input, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )


class FusedRMSNorm(_FusedNorm):
    """RMS norm over the trailing dimensions `normalized_shape`; returns the input's dtype.

    One parameter `weight` of that shape, ones, unless `elementwise_affine` is False.
    """

    weight: Parameter

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient)
        self._register("weight")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            init.ones_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if not self.elementwise_affine:
            return fused_rms_norm(input, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps, self.memory_efficient)


def _refuse_keywords(owner: str, keywords: dict[str, Any]) -> None:
    """apex's mixed modules take `elementwise_affine` with a warning, if it is True; nothing else is known."""
    unknown = sorted(keywords.keys() - {"elementwise_affine"})
    if unknown:
        raise TypeError(
            f"{owner}: unknown argument '{unknown[0]}'; accepted are normalized_shape, eps and memory_efficient."
        )
    if "elementwise_affine" in keywords:
        if not keywords["elementwise_affine"]:
            raise RuntimeError(
                f"{owner}: elementwise_affine=False is not supported, since the output has the weight's dtype."
            )
        warnings.warn(f"{owner} is always affine; drop the argument `elementwise_affine`.", stacklevel=3)


class MixedFusedLayerNorm(FusedLayerNorm):
    """FusedLayerNorm with weight and bias always there; returns the weight's dtype."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any
    ) -> None:
        _refuse_keywords("MixedFusedLayerNorm", kwargs)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        return mixed_dtype_fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )


class MixedFusedRMSNorm(FusedRMSNorm):
    """FusedRMSNorm with the weight always there; returns the weight's dtype."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any
    ) -> None:
        _refuse_keywords("MixedFusedRMSNorm", kwargs)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        return mixed_dtype_fused_rms_norm_affine(
            input, self.weight, self.normalized_shape, self.eps, self.memory_efficient
        )
