"""The host executor itself: every check catches a kernel that is broken on purpose, and lets correct kernels pass."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cuda_host import Executor, Matrix, build, executing_ptx, open_module
from cuda_host import __main__ as traffic_table

FOLDER = build.HERE / "probes"
SOURCES = [FOLDER / "broken.cu", FOLDER / "correct.cu"]


@pytest.fixture(scope="module")
def module() -> Executor:
    """The kernels of cuda_host/probes, each a function of out, in and n, launched as its table says."""
    return Executor(open_module("_cuda_host_probes", SOURCES, FOLDER / "module.cpp"), {})


@pytest.fixture(params=["g++", "nvcc"])
def probes(request, module) -> Iterator[Executor]:
    """The same, as each compiler compiles them."""
    with executing_ptx(module, SOURCES) if request.param == "nvcc" else contextlib.nullcontext():
        yield module


def run(probes, name, source=None, shape=(64,), n=64, role="output"):
    """What the kernel of that name makes of `source`; by default of 64 numbers into 64."""
    source = torch.randn(64) if source is None else source
    out = torch.zeros(shape)
    buffers = [
        Matrix("out", role, out.data_ptr(), 1, out.numel(), 0),
        Matrix("in", "input", source.data_ptr(), 1, source.numel(), 0),
    ]
    probes.call(getattr(probes, name), buffers, out.data_ptr(), source.data_ptr(), n)
    return out


# --- checks: kernel, what it must say, and about which thread ---------------------------------------------------------

ADDRESS = r"\(0x[0-9a-f]+, broken\.cu:\d+[^)]*\)"
BROKEN = {
    "reads_past_the_end": rf"outside the tensors .* thread \(63,0,0\) reads 4 bytes right after `in` {ADDRESS}",
    "writes_an_input": rf"write to an input: .* thread \(5,0,0\) writes 4 bytes at in\[5\] {ADDRESS}",
    "misaligned_vector": rf"misaligned access: .* thread \(0,0,0\) reads 16 bytes at in\[1\] {ADDRESS}",
    "writes_before_the_beginning": rf"outside the tensors .* thread \(0,0,0\) writes 4 bytes .*`out`.* {ADDRESS}",
    "misaligned_in_shared": rf"misaligned access: .* thread \(0,0,0\) writes 8 bytes at .*`slot`\+4.* {ADDRESS}",
    "leaves_one_out": r"output never written: out\[17\]",
    "reads_its_output": rf"uninitialised read: .* thread \(0,0,0\) reads 4 bytes at out\[0\] {ADDRESS}",
    "reads_unwritten_shared": rf"uninitialised read: .* \(63,0,0\) reads 4 bytes at shared `slot`\+252 .*{ADDRESS}",
    "past_dynamic_shared": rf"outside shared memory: .* \(63,0,0\) writes .*_shared`\+256 of 256 bytes {ADDRESS}",
    "misses_a_barrier": r"race on shared memory: .* \(32,0,0\) writes .* \(31,0,0\) read \(broken",
    "misses_the_second_barrier": rf"race on shared .* \(0,0,0\) reads .* {ADDRESS}, which .* \(63,0,0\) wrote \(b",
    "misses_a_warp_barrier": r"race on shared memory: .* \(1,0,0\) writes .* \(0,0,0\) read \(broken",
    "all_write_one_word": r"race on global memory: .* \(1,0,0\) writes 4 bytes at out\[7\].* \(0,0,0\) wrote",
    "blocks_write_one_word": r"race on global memory: block \(1,0,0\) .*out\[60\].* \(40,0,0\) wrote",
    "block_reads_anothers": r"race on global memory: block \(1,0,0\) .* reads 4 bytes at out\[0\].* wrote",
    "some_skip_a_barrier": r"not reached by all .* 24 threads, .* \(40,0,0\) first, have exited; .* in __syncthreads",
    "barriers_in_two_branches": r"\(32,0,0\) is in __syncthreads at broken\.cu:\d+.*, other threads are in the one at",
    "some_skip_a_shuffle": r"not reached by all .* \(20,0,0\) first, have exited; .* __shfl_xor_sync .* 0xffffffff",
    "some_skip_a_vote": r"not reached by all .* \(3,0,0\) first, have exited; 31 threads, .* __any_sync .* 0xffffffff",
    "some_skip_a_reduction": r"not reached by all .* 8 threads, .*\(32,0,0\) first, wait in __reduce_add_sync",
    "some_skip_a_warp_barrier": r"not reached by all .* \(1,0,0\) first, have exited; .* __syncwarp",
    "shuffle_from_outside_the_mask": r"thread \(15,0,0\) reads lane 16 in __shfl_sync, which is not in mask 0xffff",
    "shuffle_without_its_own_lane": r"thread \(0,0,0\) calls __shfl_sync .* mask 0xfffffffe, which lacks its own lane",
    "two_shuffles_at_once": r"thread \(1,0,0\) is in __shfl_down_sync .* other lanes .* are in __shfl_up_sync",
    "names_missing_lanes": r"thread \(32,0,0\) calls __shfl_xor_sync .* but its warp has lanes 0xffff",
    "reads_before_the_copy_landed": rf"asynchronous copy not waited for: .* thread \(0,0,0\) reads 4 bytes .*{ADDRESS}",
    "reads_anothers_copy": r"data race on shared memory: .* thread \(32,0,0\) writes .* thread \(31,0,0\) read",
    "waits_after_anothers_read": rf"asynchronous copy not waited for: .* thread \(\d+,0,0\) reads 4 bytes at .*`slot`"
    rf"\+\d+ of 256 bytes {ADDRESS}, where one that block \(0,0,0\) thread \(\d+,0,0\) issued \(broken.* goes",
    "waits_for_the_group_before": r"asynchronous copy not waited for: .* reads 4 bytes at .*`slot`\+.* issued .* goes",
    "writes_where_a_copy_comes_from": r"copy not waited for: .* writes 4 bytes at out\[\d+\].* issued .* comes from",
    "leaves_the_cluster_early": r"of a block that has exited: block \(0,0,0\) .* of block \(1,0,0\)",
    "enters_the_cluster_early": r"before the first cluster barrier.*block \(0,0,0\) .* of block \(1,0,0\)",
    "misses_a_cluster_barrier": r"race on shared memory: block \(0,0,0\) .*, which block \(1,0,0\) .* read",
    "a_block_skips_the_cluster_barrier": r"not reached by all .* \(1,0,0\) .* have exited; .* the cluster barrier",
    "too_much_static_shared": r"limits of sm_90 .* 53248 bytes of static shared memory; at most 49152",
    "dynamic_without_asking": r"limits of sm_90 .* 49156 bytes of dynamic shared memory; this kernel may have 49152",
    "asks_for_another_size": r"asks for 61440 bytes of dynamic shared memory where another call asked for 102400",
    "dynamic_beyond_the_device": r"limits of sm_90 .* 232452 bytes of dynamic shared .*; this kernel may have 49152",
    "too_much_shared_together": r"limits of sm_90 .* 4096 bytes of static and 232448 of dynamic .*; at most 232448",
    "takes_too_much": r"limits of sm_90 .* 327\d\d bytes of arguments; at most 32764",
    "block_too_large": r"limits of sm_90 .* a block of 32 x 33 x 1 threads",
    "block_too_deep": r"limits of sm_90 .* a block of 1 x 1 x 65 threads",
    "grid_too_tall": r"limits of sm_90 .* a grid of 1 x 65536 x 1 blocks",
    "grid_empty": r"limits of sm_90 .* an empty grid",
    "cluster_too_large": r"limits of sm_90 .* a cluster of 16 x 1 x 1 blocks; this kernel may have 8",
    "cluster_does_not_divide": r"limits of sm_90 .* 5 x 1 x 1 blocks that clusters of 2 x 1 x 1 do not divide",
    "beyond_its_launch_bounds": r"limits of sm_90 .* a block of 33 x 1 x 1 threads; .* __launch_bounds__ allow 32",
    "leaves_another_device": r"device not given back: .* has device 2 where it had (no device|device 0)",
    "wakes_another_device": r"context made in vain: device 0 was set current",
    "cluster_on_sm_80": r"limits of sm_80 .* a cluster of 2 x 1 x 1 blocks; this kernel may have 1",
}
LAUNCHES_COPIES = {"block_too_large", "block_too_deep", "grid_too_tall", "grid_empty", "cluster_too_large",
                   "cluster_does_not_divide", "cluster_on_sm_80", "dynamic_without_asking", "dynamic_beyond_the_device",
                   "leaves_another_device", "wakes_another_device"}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(probes, name):
    with pytest.raises(probes.Violation) as caught:
        run(probes, name)
    text = str(caught.value)
    assert re.search(BROKEN[name], text), text
    kernel = "copies" if name in LAUNCHES_COPIES else "bounded" if name == "beyond_its_launch_bounds" else name
    assert f"kernel probe::{kernel}" in text


def test_every_broken_kernel_is_tried(probes):
    listed = re.findall(r'^    \{"(\w+)"', SOURCES[0].read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(BROKEN)


def test_the_executor_goes_on_after_a_violation(probes):
    for _ in range(3):
        with pytest.raises(probes.Violation):
            run(probes, "misses_a_cluster_barrier")
        source = torch.randn(256)
        assert torch.allclose(run(probes, "cluster_sum", source, (4,), 256), source.sum(), atol=1e-5)


def test_what_an_earlier_call_asked_for_is_gone(probes):
    for n, words in ((64, "where another call asked"), (0, "102400 bytes of dynamic .*; this kernel may have 49152")):
        with pytest.raises(probes.Violation, match=words):
            run(probes, "asks_for_another_size", n=n)


def test_what_lies_between_two_rows_is_out_of_bounds(probes):
    out, source = torch.zeros(64), torch.randn(64)
    buffers = [
        Matrix("out", "output", out.data_ptr(), 1, 64, 0),
        Matrix("in", "input", source.data_ptr(), 4, 12, 0, stride=16),
    ]
    with pytest.raises(
        probes.Violation, match=r"thread \(12,0,0\) reads 4 bytes past the end of a row, at in\[0, 12\]"
    ):
        probes.call(probes.tree_in_dynamic_shared, buffers, out.data_ptr(), source.data_ptr(), 64)


def test_an_updated_buffer_may_be_read_and_left_out(probes):
    source = torch.randn(64)
    assert torch.equal(run(probes, "reads_its_output", source, role="updated"), source)
    run(probes, "leaves_one_out", role="scratch")


# --- kernels that are right -------------------------------------------------------------------------------------------


def test_block_reduction(probes):
    source = torch.randn(64 * 64)
    assert torch.allclose(run(probes, "block_sum", source, (64,), 64 * 64), source.view(64, 64).sum(1), atol=1e-5)


def test_tree_in_dynamic_shared_memory(probes):
    source = torch.randn(64)
    assert torch.allclose(run(probes, "tree_in_dynamic_shared", source), source.sum().expand(64), atol=1e-5)


def test_cluster_reduction(probes):
    source = torch.randn(8 * 64)
    expected = source.view(2, 4 * 64).sum(1).repeat_interleave(4)
    assert torch.allclose(run(probes, "cluster_sum", source, (8,), 8 * 64), expected, atol=1e-5)


def test_distributed_shared_memory(probes):
    source = torch.randn(8 * 64)
    out = run(probes, "reads_the_next_block", source, (8 * 64,), 8 * 64)
    assert torch.equal(out.view(2, 4, 64), source.view(2, 4, 64).roll(-1, 1))


def test_warp_functions(probes):
    rows = run(probes, "warp_functions", shape=(64, 8)).numpy()
    lane = np.arange(64) % 32
    within = lane % 16
    expected = [
        np.where(within < 3, lane, lane - 3),
        np.where(within + 3 > 15, lane, lane + 3),
        lane // 8 * 8 + 5,
        np.where(lane < 16, lane, lane ^ 24),
        np.full(64, 11),
        np.full(64, 1),
        np.full(64, -1 + 31 * 16),
        np.full(64, 2),
    ]
    assert np.array_equal(rows, np.stack(expected, 1))


def test_warp_barriers_order_accesses(probes):
    source = torch.randn(64)
    assert torch.equal(run(probes, "warp_exchange", source), 2 * source.view(32, 2).flip(1).flatten())


def test_asynchronous_copies(probes):
    source = torch.randn(8 * 64)
    out = run(probes, "double_buffered_copy", source)
    assert torch.allclose(out, source.view(8, 64).sum(0).flip(0), atol=1e-5)


def test_conversions_round_like_torchs(probes):
    bits = torch.arange(0, 2**32, 9973, dtype=torch.int64)
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    out = run(probes, "to_low_precision", values, values.shape, values.numel())
    bf16, fp16 = out.view(torch.bfloat16).view(2, -1)[0], out.view(torch.float16).view(2, -1)[1]
    for result, dtype in ((bf16, torch.bfloat16), (fp16, torch.float16)):
        assert torch.equal(result.isnan(), values.isnan())
        assert torch.equal(result[~values.isnan()], values[~values.isnan()].to(dtype))


# --- traffic ----------------------------------------------------------------------------------------------------------


def test_bank_conflicts_and_uncoalesced_accesses_are_counted(probes):
    probes.take_traffic()
    run(probes, "strided", torch.randn(32 * 32), (32,), 0)
    rows = [row for row in probes.take_traffic() if row.kernel == "probe::strided"]

    def costs(space: str, kind: str) -> tuple[int, ...]:
        """Accesses, cost and least cost, over all instructions: a compiler may unroll the loops."""
        own = [(row.accesses, row.cost, row.least) for row in rows if (row.space, row.kind) == (space, kind)]
        return tuple(map(sum, zip(*own, strict=True)))

    assert costs("global", "read") == (32, 32 * 32, 32 * 4)  # every lane in a sector of its own
    assert costs("global", "write") == (1, 4, 4)
    assert costs("shared", "read") == (32 + 32, 32 + 32 * 32, 32 + 32)  # padded and not
    assert costs("shared", "write") == (64, 64, 64)


def test_make_traffic_has_a_row_for_each_kernel_of_a_call(monkeypatch, capsys):
    wanted = "grad_total and grad_scale, bfloat16"
    chosen = [(name, call) for name, call in traffic_table.calls() if name == wanted]
    monkeypatch.setattr(traffic_table, "calls", lambda: chosen)
    traffic_table.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {wanted} |")]
    assert len(rows) >= 2 and all(int(row[2]) > 0 for row in rows)
