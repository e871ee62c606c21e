"""The CUDA kernels of the norms, run on the CPU with every access and meeting checked (tests/cuda_host)."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from norm_cases import MIXES, RESIDUAL_MIXES, compare, leaves, make, our_norm, strided_inputs
from torch.testing import assert_close

import bigmodel

H100, A100, H100_SLICE, T4 = range(4)  # the ordinals that the executor pretends
KINDS = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
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
@KINDS
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(d)[6:] for d in mix))
@pytest.mark.parametrize("size", [(5, 37), (9, 512), (3, 1088)], ids=str)
def test_values_and_gradients(host, centred, dtypes, size):
    input_dtype, weight_dtype, out_dtype = dtypes
    x, weight, bias = make(*size, input_dtype, weight_dtype, bias=centred)
    compare(centred, x, (size[1],), weight, bias, out_dtype=out_dtype, offset=0.5)


@KINDS
@pytest.mark.parametrize("cols", [1, 3, 4, 31, 33, 127, 129, 2047, 2052])
def test_short_rows(host, centred, cols):
    x, weight, bias = make(7, cols, bias=centred)
    compare(centred, x, (cols,), weight, bias)


@KINDS
@pytest.mark.parametrize(
    ("dtype", "cols"),
    [
        (torch.float32, 8192),  # the most that one block holds
        (torch.float32, 8196),  # a cluster of 2, the second nearly empty
        (torch.float32, 8197),
        (torch.float32, 24576),  # a cluster of 4, one block idle
        (torch.bfloat16, 40960),
        (torch.float64, 16384),
        (torch.float32, 65540),  # longer than any cluster
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_long_rows(host, centred, dtype, cols):
    x, weight, bias = make(2, cols, dtype, bias=centred)
    compare(centred, x, (cols,), weight, bias)
    assert kernels(host) >= {"norm_reduce"}


def test_long_rows_take_clusters_where_there_are_some():
    x = torch.randn(2, 16384)
    for device, kernel in ((H100, "norm_forward"), (A100, "norm_forward_any")):
        with cuda_host.as_cpu(device) as executor:
            executor.take_traffic()
            bigmodel.rms_norm(x, 16384)
            assert kernels(executor) == {kernel}


def test_rows_of_every_length_ask_for_the_same_shared_memory():
    """The executor sees to it: a launch that asked for less would lower the limit of one in another thread."""
    with cuda_host.as_cpu(H100) as executor:
        for cols in (14_001, 20_001):
            leaf = torch.randn(2, cols, requires_grad=True)
            bigmodel.rms_norm(leaf, cols, torch.ones(cols)).sum().backward()
        shared = [row for row in executor.take_traffic() if row.space == "shared" and "norm_forward_any" in row.kernel]
    assert shared


@KINDS
@pytest.mark.parametrize(
    "size", [(300, 96, torch.bfloat16), (70, 1024, torch.float32), (5, 16384, torch.float32)], ids=str
)
def test_persistent_blocks_take_several_sets_of_rows(centred, size):
    rows, cols, dtype = size
    x, weight, bias = make(rows, cols, dtype, torch.float32, bias=centred)
    with cuda_host.as_cpu(H100_SLICE):
        compare(centred, x, (cols,), weight, bias)


@KINDS
@pytest.mark.parametrize("dtypes", RESIDUAL_MIXES, ids=lambda mix: "-".join(str(d)[-7:] for d in mix))
@pytest.mark.parametrize("cols", [72, 129])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["from-input", "from-output"])
def test_residual(host, centred, dtypes, cols, memory_efficient):
    """Fused, it gives the bits of the sum and of the norm of that sum; its gradients are the norm's plus the sum's."""
    input_dtype, residual_dtype, wanted = dtypes
    x, weight, bias = make(5, cols, input_dtype, torch.float32, bias=centred)
    weight = weight.abs() + 0.5
    residual = torch.randn(5, cols, dtype=torch.float64).to(residual_dtype)
    a, r, w, b = leaves(x, residual, weight, bias)
    function, affine = (bigmodel.add_layer_norm, (w, b)) if centred else (bigmodel.add_rms_norm, (w,))
    out, summed = function(a, r, cols, *affine, 1e-5, residual_dtype=wanted, memory_efficient=memory_efficient)
    grads = [torch.randn(5, cols).to(out.dtype), torch.randn(5, cols).to(summed.dtype)]
    torch.autograd.backward([out, summed], grads)
    assert torch.equal(summed, (x.double() + residual.double()).to(summed.dtype))

    s, v, c = leaves(summed, weight, bias)
    alone = our_norm(centred, s, (cols,), v, c, 1e-5, out_dtype=out.dtype, memory_efficient=memory_efficient)
    assert torch.equal(out, alone)
    alone.backward(grads[0])
    assert torch.equal(w.grad, v.grad)
    assert b is None or torch.equal(b.grad, c.grad)
    expected = s.grad.double() + grads[1].double()
    for leaf in (a, r):
        ulp = max(torch.finfo(dtype).eps for dtype in (leaf.dtype, summed.dtype))
        assert_close(leaf.grad.double(), expected, rtol=2 * ulp, atol=4 * ulp)


@KINDS
def test_gradients_from_the_output(host, centred):
    x, weight, bias = make(11, 200, bias=centred)
    weight = weight.abs() + 0.5
    results = []
    for memory_efficient in (False, True):
        a, w, b = leaves(x, weight, bias)
        out = our_norm(centred, a, (200,), w, b, 1e-5, 1.0, memory_efficient=memory_efficient)
        out.backward(torch.linspace(-1, 1, 2200).view(11, 200))
        results.append([leaf.grad for leaf in (a, w, b) if leaf is not None])
    for usual, efficient in zip(*results, strict=True):
        assert_close(efficient, usual, rtol=1e-4, atol=2e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_alignment_do_not_change_bits(host, centred, dtype):
    for name, x in strided_inputs(dtype=dtype):
        cols = x.shape[-1]
        weight, bias = torch.randn(cols), torch.randn(cols) if centred else None
        results = []
        for layout in (x, x.clone(memory_format=torch.contiguous_format)):
            leaf = layout.detach().requires_grad_()
            out = our_norm(centred, leaf, (cols,), weight, bias, 1e-5)
            out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
            results.append((out, leaf.grad))
        assert torch.equal(results[0][0], results[1][0]), name
        assert torch.equal(results[0][1], results[1][1]), name


@KINDS
@pytest.mark.parametrize("cols", [125, 16381])
def test_aligned_rows_that_end_within_a_pack(host, centred, cols):
    """Input rows may start at multiples of 16 bytes where those of the output cannot."""
    x, weight, bias = make(3, cols + 3, bias=centred)
    rows = x[:, :cols]
    weight, bias = weight[:cols], None if bias is None else bias[:cols]
    leaf = rows.detach().requires_grad_()
    out = our_norm(centred, leaf, (cols,), weight, bias, 1e-5)
    out.backward(x[:, :cols])
    other = rows.contiguous().requires_grad_()
    expected = our_norm(centred, other, (cols,), weight, bias, 1e-5)
    expected.backward(x[:, :cols].contiguous())
    assert torch.equal(out, expected) and torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [1024, 16384])
def test_every_pointer_may_be_misaligned(host, dtype, cols):
    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    x, weight, bias = make(2, cols, dtype)
    expected = None
    for move in (lambda t: t, shifted):
        a, w, b = leaves(*map(move, (x, weight, bias)))
        out = bigmodel.layer_norm(a, cols, w, b)
        out.backward(move(torch.linspace(-1, 1, 2 * cols).view(2, cols).to(dtype)))
        expected = expected or (out, a.grad)
        assert torch.equal(out, expected[0]) and torch.equal(a.grad, expected[1])


@KINDS
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)], ids=str)
def test_empty(host, centred, shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    out = our_norm(centred, x, shape[-1:], weight, None, 1e-5)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@KINDS
@pytest.mark.parametrize("cols", [100, 16384])
def test_bits_of_a_row_do_not_depend_on_the_others(host, centred, cols):
    x, weight, bias = make(9, cols, torch.bfloat16, bias=centred)
    grad = torch.randn_like(x)

    def run(rows):
        leaf = x[rows].detach().requires_grad_()
        out = our_norm(centred, leaf, (cols,), weight, bias, 1e-5)
        out.backward(grad[rows])
        return out, leaf.grad

    whole, one = run(slice(None)), run(slice(5, 6))
    assert torch.equal(whole[0][5], one[0][0]) and torch.equal(whole[1][5], one[1][0])


# --- traffic ----------------------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [512, 4096, 16384])
def test_warps_touch_no_more_memory_than_they_need(centred, dtype, cols):
    """Aligned rows: no access of a warp takes a sector too many, and no two of its lanes meet in a bank."""
    x, weight, bias = make(4, cols, dtype, bias=centred)
    x.requires_grad_()
    with cuda_host.as_cpu(H100) as executor:
        executor.take_traffic()
        our_norm(centred, x, (cols,), weight, bias, 1e-5).sum().backward()
        rows = executor.take_traffic()
    assert {row.space for row in rows} == {"global", "shared"}
    wasteful = [row for row in rows if row.cost > row.least]
    assert not wasteful, cuda_host.table(wasteful)


def test_traffic_of_every_kernel_is_reported():
    """The table goes to build/cuda_host/norm_traffic.txt."""
    with cuda_host.as_cpu(H100) as executor:
        executor.take_traffic()
        for cols in (1024, 1023):
            leaf, w, b = leaves(*make(64, cols, torch.bfloat16))
            bigmodel.layer_norm(leaf, cols, w, b).sum().backward()
        rows = executor.take_traffic()
    table = cuda_host.table(rows)
    (cuda_host.build.BUILD / "norm_traffic.txt").write_text(table + "\n")
    for kernel in ("norm_forward<", "norm_forward_any<", "norm_backward<", "norm_backward_any<", "norm_reduce<"):
        assert kernel in table


@pytest.mark.parametrize("before", [-1, H100, A100], ids=["none", "the first", "another"])
def test_a_call_leaves_the_threads_device_as_it_was(before):
    """And makes no context elsewhere, which the executor checks after each call."""
    with cuda_host.as_cpu(H100_SLICE) as executor:
        executor.context = before
        try:
            x = torch.randn(3, 40, requires_grad=True)
            bigmodel.rms_norm(x, 40).sum().backward()
            assert executor.context == before
        finally:
            executor.context = -1
