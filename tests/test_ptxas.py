"""What the compiler makes of the norm kernels for sm_90: all in registers, and rows moved 16 bytes at a time."""

import ptxas
import pytest

COMPILED = ["float, float", "double, double", *(f"{x}, {w}" for x in ("BFloat16", "Float16") for w in (x, "float"))]


@pytest.fixture(scope="module")
def kernels():
    nvcc = ptxas.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI")
    return {k.name: k for k in ptxas.kernels(ptxas.ROOT / "csrc" / "cuda" / "norm.cu", "sm_90", nvcc)}


def test_nothing_spills(kernels):
    leaking = {k.name: (k.stack_bytes, k.spill_bytes) for k in kernels.values() if k.stack_bytes or k.spill_bytes}
    assert not leaking
    assert not [k.name for k in kernels.values() for access in k.accesses if ".local" in access]


@pytest.mark.parametrize("dtypes", COMPILED)
def test_a_block_of_the_largest_size_fits(kernels, dtypes):
    """65536 registers on an SM; 512 threads in a block, of which forward wants two."""
    assert kernels[f"cuda::norm_forward<{dtypes}>"].registers <= 64
    assert kernels[f"cuda::norm_backward<{dtypes}>"].registers <= 128


@pytest.mark.parametrize(("kernel", "scalars"), [("norm_forward", {"st": 2}), ("norm_backward", {"ld": 4})])
@pytest.mark.parametrize("dtypes", COMPILED)
def test_rows_move_16_bytes_at_a_time(kernels, kernel, scalars, dtypes):
    """All but the statistics: mean and rstd of a row, which backward reads one row ahead."""
    accesses = kernels[f"cuda::{kernel}<{dtypes}>"].accesses
    wide = {access for access in accesses if ".v4." in access or ".v2.f64" in access or ".v2.u64" in access}
    narrow = {access: n for access, n in accesses.items() if access not in wide}
    assert {access.split(".")[0] for access in wide} == {"ld", "st"}
    for access, n in narrow.items():
        assert n <= scalars.get(access.split(".")[0], 0), f"{access} stands {n} times in {kernel}<{dtypes}>"


@pytest.fixture(scope="module")
def softmax_kernels():
    nvcc = ptxas.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI")
    return {k.name: k for k in ptxas.kernels(ptxas.ROOT / "csrc" / "cuda" / "softmax.cu", "sm_90", nvcc)}


def test_softmax_keeps_its_rows_in_registers(softmax_kernels):
    leaking = [k.name for k in softmax_kernels.values() if k.stack_bytes or k.spill_bytes]
    leaking += [k.name for k in softmax_kernels.values() for access in k.accesses if ".local" in access]
    assert not leaking
    for dtype in ("float", "double", "BFloat16", "Float16"):
        for name in ("softmax_forward", "softmax_backward"):
            kernel = softmax_kernels[f"cuda::{name}<{dtype}>"]
            assert kernel.registers <= 128, "a block of 512 threads has to fit"
            wide = {access.split(".")[0] for access in kernel.accesses if ".v4." in access or ".v2." in access}
            assert wide == {"ld", "st"}


def test_scaled_scores_are_rounded_before_the_largest_is_taken_away(softmax_kernels):
    """Fused into one instruction, z - max(z) of the largest z is what rounding took from it, and exp() of that inf."""
    for kernel, scores in (("softmax_forward<float>", 16), ("softmax_forward<BFloat16>", 16),
                           ("softmax_forward<double>", 8), ("softmax_forward_any<float, 4>", 4)):  # fmt: skip
        assert softmax_kernels[f"cuda::{kernel}"].rounded_products >= scores, kernel
