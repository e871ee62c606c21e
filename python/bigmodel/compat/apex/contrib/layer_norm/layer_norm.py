"""apex.contrib.layer_norm.layer_norm: layer norm over a last dimension of any length, in the weight's dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter, init

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex._autocast_utils import _cast_if_autocast_enabled
from bigmodel.compat.apex.normalization.fused_layer_norm import _Function
from bigmodel.ops import layer_norm
from bigmodel.ops._norm_checks import check_module

__all__ = ["FastLayerNorm", "FastLayerNormFN"]
__getattr__ = attributes_of(__name__)


class FastLayerNormFN(_Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, memory_efficient: bool = False) -> Tensor:
        return layer_norm(
            x, gamma.shape, gamma, beta, epsilon, memory_efficient=memory_efficient, out_dtype=gamma.dtype
        )


def _fast_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, memory_efficient: bool) -> Tensor:
    return FastLayerNormFN.apply(*_cast_if_autocast_enabled(x, weight, bias, epsilon, memory_efficient))


class FastLayerNorm(torch.nn.Module):
    """Layer norm over the last dimension, of length `hidden_size`; returns the weight's dtype.

    Parameters `weight` (ones) and `bias` (zeros) of shape (hidden_size,). Formula and source: fused_layer_norm.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, memory_efficient: bool = False) -> None:
        super().__init__()
        check_module("FastLayerNorm", hidden_size, eps, 0.0, memory_efficient, None, True)
        self.epsilon = eps
        self.memory_efficient = memory_efficient
        self.weight = Parameter(torch.empty(hidden_size))
        self.bias = Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _fast_layer_norm(x, self.weight, self.bias, self.epsilon, self.memory_efficient)
