"""apex.optimizers: fused Adam."""

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.optimizers.fused_adam import FusedAdam

__all__ = ["FusedAdam"]
__getattr__ = attributes_of(__name__)
