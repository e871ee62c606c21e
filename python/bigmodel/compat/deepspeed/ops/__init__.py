"""deepspeed.ops: the CPU Adam."""

from bigmodel.compat.deepspeed.ops import adam

__all__ = ["adam"]
