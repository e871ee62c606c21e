"""The ops, one file each."""

from bigmodel.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from bigmodel.ops.softmax import attention_softmax, log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_softmax",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "softmax",
]
