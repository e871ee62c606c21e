"""The ops, one file each."""

from bigmodel.ops._table import TableCache
from bigmodel.ops.adagrad import adagrad_
from bigmodel.ops.adam import adam_
from bigmodel.ops.ema import ema_
from bigmodel.ops.grad_norm import grad_clip, grad_scale_, grad_total
from bigmodel.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from bigmodel.ops.sgd import sgd_
from bigmodel.ops.softmax import attention_softmax, log_softmax, softmax

__all__ = [
    "TableCache",
    "adagrad_",
    "adam_",
    "add_layer_norm",
    "add_rms_norm",
    "attention_softmax",
    "ema_",
    "grad_clip",
    "grad_scale_",
    "grad_total",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "sgd_",
    "softmax",
]
