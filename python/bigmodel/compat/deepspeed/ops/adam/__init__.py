"""deepspeed.ops.adam: the CPU Adam."""

from bigmodel.compat.deepspeed.ops.adam.cpu_adam import DeepSpeedCPUAdam

__all__ = ["DeepSpeedCPUAdam"]
