"""apex.transformer.layers.layer_norm: `sequence_parallel_enabled` on the module and on its parameters.

Megatron reads the attribute to know which gradients to all-reduce over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.contrib.layer_norm import FastLayerNorm as _FastLayerNorm
from bigmodel.compat.apex.normalization import FusedLayerNorm as _FusedLayerNorm
from bigmodel.compat.apex.normalization import MixedFusedLayerNorm as _MixedFusedLayerNorm
from bigmodel.compat.apex.normalization.fused_layer_norm import Shape

__all__ = ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"]
__getattr__ = attributes_of(__name__)


def _mark(module: torch.nn.Module, sequence_parallel_enabled: bool) -> None:
    marked: list[Any] = [module, *module.parameters()]
    for each in marked:
        each.sequence_parallel_enabled = sequence_parallel_enabled


class FusedLayerNorm(_FusedLayerNorm):
    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        sequence_parallel_enabled: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        _mark(self, sequence_parallel_enabled)


class MixedFusedLayerNorm(_MixedFusedLayerNorm):
    def __init__(self, normalized_shape: Shape, eps: float = 1e-5, **kwargs: Any) -> None:
        sequence_parallel_enabled = kwargs.pop("sequence_parallel_enabled", False)
        super().__init__(normalized_shape, eps, **kwargs)
        _mark(self, sequence_parallel_enabled)


class FastLayerNorm(_FastLayerNorm):
    def __init__(self, hidden_size: int, eps: float = 1e-5, *, sequence_parallel_enabled: bool = False) -> None:
        super().__init__(hidden_size, eps)
        _mark(self, sequence_parallel_enabled)
