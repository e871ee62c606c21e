"""DeepSpeed's module paths and signatures over bigmodel: replace `deepspeed` by `bigmodel.compat.deepspeed` in imports.

`ops.adam.DeepSpeedCPUAdam` is all that is mirrored. Checked against deepspeedai/DeepSpeed at a9a6188.
"""

from bigmodel.compat.deepspeed import ops

__all__ = ["ops"]
