"""apex.transformer.layers: layer norms that mark their parameters for Megatron's sequence parallelism."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.transformer.layers.layer_norm import FastLayerNorm, FusedLayerNorm, MixedFusedLayerNorm

__all__ = ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"]
__getattr__ = attributes_of(__name__)
