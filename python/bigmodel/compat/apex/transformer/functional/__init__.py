"""apex.transformer.functional: of it, the attention softmax."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.transformer.functional.fused_softmax import (
    FusedScaleMaskSoftmax,
    GenericFusedScaleMaskSoftmax,
    generic_scaled_masked_softmax,
    scaled_masked_softmax,
    scaled_upper_triang_masked_softmax,
)

__all__ = [
    "FusedScaleMaskSoftmax",
    "GenericFusedScaleMaskSoftmax",
    "generic_scaled_masked_softmax",
    "scaled_masked_softmax",
    "scaled_upper_triang_masked_softmax",
]
__getattr__ = attributes_of(__name__)
