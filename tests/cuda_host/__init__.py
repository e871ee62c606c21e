"""The CUDA sources, run and checked on the CPU."""

from .contracts import Matrix
from .executor import Executor, Traffic, as_cpu, executing_ptx, load, open_module, table

__all__ = ["Executor", "Matrix", "Traffic", "as_cpu", "executing_ptx", "load", "open_module", "table"]
