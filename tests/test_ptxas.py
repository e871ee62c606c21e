"""What the compiler makes of the CUDA kernels, for every architecture: all in registers, 16 bytes at a time.

A hot kernel's loop over its rows or tiles is found in the machine code. What it may move in narrower accesses is
listed here; kernels that serve formats known at run time must have a way round the loop on which every access is 16
bytes wide.
"""

from __future__ import annotations

from typing import NamedTuple

import ptxas
import pytest
import sass


class Hot(NamedTuple):
    """Accesses of 16 bytes that have to stand in the loop, and how many narrower ones may; None: besides a way round
    that has none."""

    reads: int
    writes: int
    narrow_reads: int | None = None
    narrow_writes: int | None = None


def hot_kernels() -> dict[str, Hot]:
    hot = {}
    # Four packs of a row each of x and a residual, and of weight and bias; out and the sum; mean and rstd are written.
    # Backward copies x, grad_out and grad_summed for this row and the next, and reads the next one's mean and rstd.
    for x, w, weights in (
        *((t, t, 1) for t in ("float", "double", "BFloat16", "Float16")),
        *((t, "float", 2) for t in ("BFloat16", "Float16")),
    ):
        hot[f"norm_forward<{x}, {w}>"] = Hot(8 + 8 * weights, 8, 0, 2)
        hot[f"norm_backward<{x}, {w}>"] = Hot(24 + 16 * weights, 4, 2, 0)
    # 32 values of a thread (16 of float64) are held. Forward: scores and the mask in each dtype of which a pack has 16
    # bytes; the result. Backward: result, its gradient, scores under a soft-cap; gradients of scores and of the mask.
    for t, packs, with_mask in (("float", 8, 4), ("double", 8, 2), ("BFloat16", 4, 9), ("Float16", 4, 9)):
        hot[f"softmax_forward<{t}>"] = Hot(packs * with_mask, packs)
        hot[f"softmax_backward<{t}>"] = Hot(3 * packs, 2 * packs)
    # Rows that no block can hold: packs of as many elements in every dtype that fills them. Forward reads scores and
    # mask twice; backward the result and its gradient twice and scores once, and writes the mask's float32 part.
    for t, packs, part in (("float, 8", 8, 2), ("float, 4", 3, 1), ("double, 2", 1, 1)):
        hot[f"softmax_forward_any<{t}, false>"] = Hot(4 * packs, packs)
        hot[f"softmax_backward_any<{t}>"] = Hot(5 * packs, packs + part)
    # Two packs of a stream of float32, their pair in 16 bits, four of float64; float64 rows: two of float64.
    for op, reads, writes in (("Adam", 7, 6), ("Sgd", 3, 2), ("Adagrad", 3, 2), ("Ema", 2, 1), ("Scale", 1, 1)):
        hot[f"update<{op}Op, float>"] = Hot(7 * reads, 7 * writes)
        hot[f"update<{op}Op, double>"] = Hot(2 * reads, 2 * writes)
    hot["grad_partials"] = Hot(16, 0)  # four packs in each dtype
    return hot


HOT = hot_kernels()


@pytest.fixture(scope="module", params=ptxas.ARCHITECTURES)
def kernels(request):
    tools = ptxas.find_tools()
    if isinstance(tools, str):
        pytest.skip(tools)
    return ptxas.compile_all(request.param, tools)


def test_nothing_spills(kernels):
    assert not {k.name: (k.stack_bytes, k.spill_bytes) for k in kernels.values() if k.stack_bytes or k.spill_bytes}
    assert not [k.name for k in kernels.values() if sass.moved(k.code.accesses(), ("LDL", "STL"))]


def test_hot_kernels_exist(kernels):
    assert HOT.keys() <= kernels.keys()


def test_rows_move_16_bytes_at_a_time(kernels):
    failures = []
    for name, wanted in HOT.items():
        failures += [f"{name}: {failure}" for failure in narrowed(kernels[name].code, wanted)]
    assert not failures


def narrowed(code: sass.Code, wanted: Hot) -> list[str]:
    code = code.over_rows()
    loops = code.row_loops()
    accesses = code.accesses(set.union(*loops))
    found = []
    if wanted.narrow_reads is not None:
        for kinds, most in ((sass.READS, wanted.narrow_reads), (sass.WRITES, wanted.narrow_writes)):
            narrow = sass.moved(accesses, kinds) - sass.moved(accesses, kinds, 128)
            if narrow > most:
                found.append(f"{narrow} narrow accesses {kinds}, at most {most}")
    else:
        ways = [way for loop in loops for way in code.wide_ways(loop)]
        accesses = code.accesses(set().union(*ways))
    for kinds, least in ((sass.READS, wanted.reads), (sass.WRITES, wanted.writes)):
        if (wide := sass.moved(accesses, kinds, 128)) < least:
            found.append(f"{wide} accesses {kinds} of 16 bytes, at least {least}")
    return found


def test_blocks_fit_on_a_multiprocessor(kernels):
    """So much must be under way to hide the memory's latency; norm_backward fetches ahead and needs one block."""
    for name, kernel in kernels.items():
        least = 3 if name.startswith(("update", "grad")) else 1 if name.startswith("norm_backward") else 2
        assert kernel.blocks >= least, name


def test_scaled_scores_are_rounded_before_the_largest_is_taken_away(kernels):
    """Fused into one instruction, z - max(z) of the largest z is what rounding took from it, and exp() of that inf."""
    for kernel, scores in (("softmax_forward<float>", 32), ("softmax_forward<BFloat16>", 32),
                           ("softmax_forward<double>", 16), ("softmax_forward_any<float, 4, false>", 4)):  # fmt: skip
        assert kernels[kernel].rounded_products >= scores, kernel
