"""apex.transformer.enums: names for the kinds of layers, attention and masks."""

from __future__ import annotations

import enum

from bigmodel.compat.apex._absent import attributes_of

__all__ = ["AttnMaskType", "AttnType", "LayerType", "ModelType"]
__getattr__ = attributes_of(__name__)


class LayerType(enum.Enum):
    encoder = 1
    decoder = 2


class AttnType(enum.Enum):
    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    padding = 1
    causal = 2


class ModelType(enum.Enum):
    encoder_or_decoder = 1
    encoder_and_decoder = 2
