"""Modules over the ops: subclasses of torch.nn's own where it has them, so isinstance, state_dict and copying hold."""

from bigmodel.nn.attention import AttentionSoftmax, MultiheadAttention
from bigmodel.nn.norm import LayerNorm, RMSNorm
from bigmodel.nn.position import SinusoidalPositionalEncoding, alibi_slopes

__all__ = [
    "AttentionSoftmax",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "SinusoidalPositionalEncoding",
    "alibi_slopes",
]
