"""Finds and imports the compiled module `_C`, once.

`_C` is compiled with OpenMP but linked against no OpenMP runtime: its symbols resolve to the one that torch has already
loaded, whatever that torch wheel calls the file, so a process never holds two thread pools that fight for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from types import ModuleType

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, torch's own first."""
    with open("/proc/self/maps") as maps:
        paths = re.findall(r"^(?:\S+ +){5}(/.*/lib(?:g|i)?omp5?[^/\n]*\.so[^/\n]*)$", maps.read(), flags=re.MULTILINE)
    home = os.path.dirname(os.path.dirname(torch.__file__))
    return sorted(dict.fromkeys(paths), key=lambda path: not path.startswith(os.path.join(home, "torch")))


@functools.cache
def load() -> ModuleType:
    """Returns the compiled module; ImportError in one sentence if it or an OpenMP runtime is missing."""
    runtimes = openmp_runtimes()
    if not runtimes:
        raise ImportError(
            "bigmodel: this torch has loaded no OpenMP runtime (libgomp, libomp or libiomp5), which its kernels need."
        )
    try:
        ctypes.CDLL(runtimes[0], mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL | os.RTLD_NOW)
    except OSError as error:
        raise ImportError(f"bigmodel: the OpenMP runtime that torch has loaded cannot be shared: {error}.") from error
    try:
        from bigmodel import _C
    except ModuleNotFoundError as error:
        raise ImportError(
            "bigmodel: the compiled module is missing; install the package with `pip install .`."
        ) from error
    return _C
