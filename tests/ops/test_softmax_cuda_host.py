"""The CUDA kernels of the softmax, run on the CPU with every access and meeting checked (tests/cuda_host)."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from softmax_cases import calls, compare
from torch.testing import assert_close

import bigmodel

H100, A100, _, T4 = range(4)  # the ordinals that the executor pretends
pytestmark = pytest.mark.usefixtures("either_compiler")


@pytest.fixture(params=[H100, A100, T4], ids=["sm_90", "sm_80", "sm_75"])
def host(request):
    with cuda_host.as_cpu(request.param) as executor:
        executor.take_traffic()
        yield executor


def kernels(executor) -> set[str]:
    """The kernels that have run since the last call, without their template arguments."""
    return {row.kernel.split("<")[0].split("::")[-1] for row in executor.take_traffic()}


# --- values -----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(calls(max_keys=40))
def test_every_combination_of_options(call):
    scores, options = call
    with cuda_host.as_cpu(H100):
        compare(scores, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keys", [8, 264, 1024, 4096])
def test_aligned_rows_take_the_kernels_for_short_ones(host, dtype, keys):
    scores = torch.randn(1, 2, 3, keys).to(dtype)
    compare(scores, scale=0.5, causal=True, mask=torch.rand(keys) > 0.2, softcap=5.0)
    assert kernels(host) == {"softmax_forward", "softmax_backward"}


@pytest.mark.parametrize(
    ("dtype", "keys"), [(torch.float32, 8192), (torch.float32, 8196), (torch.bfloat16, 20_001), (torch.float64, 4098)]
)
def test_long_rows(dtype, keys):
    with cuda_host.as_cpu(H100) as executor:
        executor.take_traffic()
        scores = torch.randn(1, 1, 2, keys).to(dtype)
        compare(scores, scale=0.5, sinks=torch.zeros(1, dtype=dtype), dropout_p=0.3, window=(keys - 7, 0))
        held = "" if keys == 8192 else "_any"
        assert kernels(executor) == {f"softmax_forward{held}", f"softmax_backward{held}", "softmax_reduce_sinks"}
        x = scores[0, 0]
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {}
        assert_close(bigmodel.log_softmax(x), torch.log_softmax(x, -1), **tolerance)


@pytest.mark.parametrize("keys", [64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pointer_may_be_misaligned(host, dtype, keys):
    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    scores, grad = torch.randn(2, 3, keys).to(dtype), torch.randn(2, 3, keys).to(dtype)
    results = []
    for move in (lambda t: t, shifted):
        leaf = move(scores).detach().requires_grad_()
        out = bigmodel.attention_softmax(leaf, causal=True)
        out.backward(move(grad))
        results.append((out.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_of_a_mask_over_many_rows(host):
    for shape in ((70,), (1, 5, 1), (2, 1, 70), (3, 1, 1, 70), (3, 2, 5, 70)):
        compare(torch.randn(3, 2, 5, 70), mask=torch.randn(shape))
        assert "softmax_reduce_mask" in kernels(host)


def test_bits_of_a_row_do_not_depend_on_the_others(host):
    for keys in (100, 1024, 8200):
        scores, grad = torch.randn(1, 2, 3, keys), torch.randn(1, 2, 3, keys)

        def run(heads, scores=scores, grad=grad):
            leaf = scores[:, heads].detach().requires_grad_()
            out = bigmodel.attention_softmax(leaf, causal=True)
            out.backward(grad[:, heads])
            return out.detach(), leaf.grad

        whole, one = run(slice(None)), run(slice(1, 2))
        assert torch.equal(whole[0][:, 1], one[0][:, 0]) and torch.equal(whole[1][:, 1], one[1][:, 0])


ROWWISE = {
    "soft-cap": lambda x: bigmodel.attention_softmax(x, scale=0.7, softcap=4.0),
    "mask": lambda x: bigmodel.attention_softmax(x, mask=torch.linspace(-1, 1, x.shape[-1])),
    "softmax": lambda x: bigmodel.softmax(x),
    "log_softmax": lambda x: bigmodel.log_softmax(x),
}


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_of_a_row_do_not_depend_on_the_alignment_of_its_batch(dtype, name):
    """Rows at an odd distance cannot all move by 16 bytes; one alone has no distance, and may take the other kernel."""
    with cuda_host.as_cpu(H100) as executor:
        for keys in (16, 800, 1024, 4096):
            scores, grad = ((3 * torch.randn(9, keys + 1)).to(dtype)[:, :keys] for _ in range(2))
            executor.take_traffic()

            def run(rows, scores=scores, grad=grad):
                leaf = scores[rows].detach().requires_grad_()
                out = ROWWISE[name](leaf)
                out.backward(grad[rows])
                return out.detach(), leaf.grad

            whole = run(slice(None))
            for row in (0, 3, 8):
                for a, b in zip(whole, run(slice(row, row + 1)), strict=True):
                    assert torch.equal(a[row], b[0]), f"{keys} keys, row {row}"
            if "softmax" not in name:  # those read contiguous rows
                assert kernels(executor) == {
                    f"softmax_{way}" for way in ("forward", "forward_any", "backward", "backward_any")
                }


# --- traffic ----------------------------------------------------------------------------------------------------------
def sectors(executor, kind):
    return sum(row.cost for row in executor.take_traffic() if row.space == "global" and row.kind == kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [512, 2048])
def test_warps_touch_no_more_memory_than_they_need(dtype, keys):
    """Aligned rows: no access of a warp takes a sector too many, and no two of its lanes meet in a bank."""
    with cuda_host.as_cpu(H100) as executor:
        executor.take_traffic()
        x = torch.randn(4, keys, dtype=dtype, requires_grad=True)
        bigmodel.softmax(x).backward(torch.randn(4, keys).to(dtype))
        rows = executor.take_traffic()
    wasteful = [row for row in rows if row.cost > row.least]
    assert not wasteful, cuda_host.table(wasteful)
    row_sectors = 4 * keys * dtype.itemsize // 32
    for kernel, reads, writes in (("softmax_forward", 1, 1), ("softmax_backward", 2, 1)):
        own = [row for row in rows if row.space == "global" and f"::{kernel}<" in row.kernel]
        assert sum(row.cost for row in own if row.kind == "read") == reads * row_sectors
        assert sum(row.cost for row in own if row.kind == "write") == writes * row_sectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keys", [40, 1000])
def test_misaligned_rows_are_held_without_bank_conflicts(dtype, keys):
    with cuda_host.as_cpu(H100) as executor:
        executor.take_traffic()
        bigmodel.attention_softmax(torch.randn(4, keys + 1).to(dtype)[:, 1:])
        rows = [row for row in executor.take_traffic() if row.space == "shared"]
    assert {row.kernel.split("<")[0].split("::")[-1] for row in rows} == {"softmax_forward_any"}
    assert all(row.cost == row.least for row in rows), cuda_host.table(rows)


@pytest.mark.parametrize("keys", [256, 255])
def test_causal_rows_read_only_what_is_live(keys):
    reads = {}
    with cuda_host.as_cpu(H100) as executor:
        for causal in (False, True):
            executor.take_traffic()
            bigmodel.attention_softmax(torch.randn(1, 1, keys, keys), causal=causal)
            reads[causal] = sectors(executor, "read")
    assert reads[True] < 0.56 * reads[False]
