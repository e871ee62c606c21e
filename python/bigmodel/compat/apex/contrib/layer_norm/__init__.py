"""apex.contrib.layer_norm: FastLayerNorm."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.contrib.layer_norm.layer_norm import FastLayerNorm

__all__ = ["FastLayerNorm"]
__getattr__ = attributes_of(__name__)
