"""apex.transformer, as it was until apex removed it in January 2026: of it, functional.fused_softmax, layers, enums."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.transformer import functional, layers
from bigmodel.compat.apex.transformer.enums import AttnMaskType, AttnType, LayerType

__all__ = ["AttnMaskType", "AttnType", "LayerType", "functional", "layers"]
__getattr__ = attributes_of(__name__)
