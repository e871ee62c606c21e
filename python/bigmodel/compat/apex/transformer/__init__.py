"""apex.transformer, as it was until apex removed it in January 2026: of it, layers."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.transformer import layers

__all__ = ["layers"]
__getattr__ = attributes_of(__name__)
