"""Memory of large CPU tensors, kept between calls.

malloc gives blocks of 32 MiB and more back to the system at once, and the system zeroes every page of the next one on
first touch, which takes longer than the arithmetic (docs/decisions.md). The blocks made here are kept when their tensor
dies and serve later ones; they are marked with MADV_FREE, so that the system may take their pages when it runs short.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes: of two huge pages one is sure to be aligned
_MADV_FREE = getattr(mmap, "MADV_FREE", 8)  # some Pythons were built against headers without it


def _limit() -> int:
    """Bytes to keep at the most: half of the machine's, and not what an address-space limit leaves for others."""
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return half if space == resource.RLIM_INFINITY else min(half, space // 4)


class _Owner(weakref.ref):
    """Watches a tensor's hold on a block."""

    __slots__ = ("block",)
    block: mmap.mmap


# A tensor may die on any thread and in the middle of anything. All that happens then is `_dead.append`, which is no
# Python code: an interrupt that arrives in such code would be raised there and lost. The next call does the rest.
_owners: dict[int, _Owner] = {}
_dead: deque[_Owner] = deque()
_free: dict[int, list[mmap.mmap]] = {}  # by size, the size that was given back last at the end
_peak = 0  # bytes of blocks in use, at the most so far
_LIMIT = _limit()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor of at least `LARGE` bytes, in huge pages where the system has them.

    Only its storage cannot be resized; in all else it is what torch.empty returns.
    """
    count = math.prod(shape)
    try:
        block = _take(_block_size(count * dtype.itemsize))
    except OSError:  # no memory: torch says so in its own words, or finds some
        release_memory()
        return torch.empty(shape, dtype=dtype, device="cpu")
    view = memoryview(block)  # torch holds the view and nothing else does, so its end is the tensor's
    owner = _Owner(view, _dead.append)
    owner.block = block
    _owners[id(owner)] = owner
    return torch.frombuffer(view, dtype=dtype, count=count).resize_(shape)


def release_memory() -> None:
    """Gives the memory of large CPU outputs that is kept for later ones, and not in use, back to the system."""
    _collect_dead()
    _free.clear()


def _block_size(size: int) -> int:
    """Rounded up, by an eighth or 2 MiB at the most, so that nearly equal sizes share blocks.

    What is rounded up is not touched, and so costs address space only.
    """
    step = 1 << max(21, size.bit_length() - 4)
    return -(-size // step) * step


def _take(size: int) -> mmap.mmap:
    global _peak
    _collect_dead()
    _peak = max(_peak, size + sum(len(owner.block) for owner in list(_owners.values())))
    try:
        return _free[size].pop()
    except (KeyError, IndexError):
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _collect_dead() -> None:
    """Makes the blocks of dead tensors free, and unmaps the longest unused beyond what has been in use at one time."""
    while _dead:
        try:
            owner = _dead.popleft()
        except IndexError:  # another thread was faster
            break
        del _owners[id(owner)]
        with contextlib.suppress(OSError):  # a system that cannot mark it: let it go
            owner.block.madvise(_MADV_FREE)
            blocks = _free.pop(len(owner.block), [])
            blocks.append(owner.block)  # into the one list: two lists could give a block out twice
            _free[len(owner.block)] = blocks
    excess = _kept_bytes() - min(_peak, _LIMIT)
    while excess > 0 and (size := next(iter(_free), None)) is not None:
        with contextlib.suppress(KeyError, IndexError):
            _free[size].pop()
            excess -= size
        if not _free.get(size):
            _free.pop(size, None)


def _kept_bytes() -> int:
    return sum(size * len(blocks) for size, blocks in list(_free.items()))
