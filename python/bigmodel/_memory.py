"""Memory of large CPU tensors, kept between calls.

malloc gives blocks of 32 MiB and more back to the system at once, and the system zeroes every page of the next one on
first touch, which takes longer than the arithmetic (docs/decisions.md). The blocks made here go back to a list when
their tensor dies, marked with MADV_FREE: the system takes their pages when it runs short of memory, and only then.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes: of two huge pages one is sure to be aligned
_KEPT_AT_MOST = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

# Free blocks by size, the size that was given back last at the end. Tensors die on any thread and in the middle of
# anything, so no lock is held: when two changes meet, the worst is a block unmapped that could have been kept.
_free: dict[int, list[mmap.mmap]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor of at least `LARGE` bytes, in huge pages where the system has them.

    Only its storage cannot be resized; in all else it is what torch.empty returns.
    """
    count = math.prod(shape)
    try:
        block = _take(_block_size(count * dtype.itemsize))
    except OSError:  # no memory: torch says so in its own words, or finds some
        _free.clear()
        return torch.empty(shape, dtype=dtype)
    view = memoryview(block)  # torch holds the view and nothing else does, so its end is the tensor's
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).resize_(shape)


def _block_size(size: int) -> int:
    """Rounded up, at most by an eighth, so that nearly equal sizes share blocks; what is not touched costs nothing."""
    step = 1 << max(21, size.bit_length() - 4)
    return -(-size // step) * step


def _take(size: int) -> mmap.mmap:
    with contextlib.suppress(KeyError, IndexError):
        return _free[size].pop()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    try:
        block.madvise(mmap.MADV_FREE)
    except OSError:  # before Linux 4.5: not ours to keep
        return
    size = len(block)
    _free[size] = [*_free.pop(size, ()), block]
    while sum(size * len(blocks) for size, blocks in list(_free.items())) > _KEPT_AT_MOST:
        _free.pop(next(iter(_free)), None)
