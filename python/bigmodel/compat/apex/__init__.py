"""NVIDIA apex's module paths and signatures over bigmodel's ops: replace `apex` by `bigmodel.compat.apex` in imports.

What is mirrored, and where it differs: docs/compat-apex.md. Checked against NVIDIA/apex of July 2026.
"""

from bigmodel.compat.apex import contrib, normalization, optimizers, transformer
from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex.optimizers import FusedAdam

__all__ = ["FusedAdam", "contrib", "normalization", "optimizers", "transformer"]
__getattr__ = attributes_of(__name__)
