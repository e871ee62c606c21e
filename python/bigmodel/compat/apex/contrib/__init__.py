"""apex.contrib: of it, layer_norm."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.contrib import layer_norm

__all__ = ["layer_norm"]
__getattr__ = attributes_of(__name__)
