"""apex.normalization: fused layer and RMS normalisation."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.normalization.fused_layer_norm import (
    FusedLayerNorm,
    FusedRMSNorm,
    MixedFusedLayerNorm,
    MixedFusedRMSNorm,
)

__all__ = ["FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"]
__getattr__ = attributes_of(__name__)
