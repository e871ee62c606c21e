"""What the compiler makes of the optimizer kernels for sm_90: all in registers, float32 moved 16 bytes at a time."""

import ptxas
import pytest

OPS = ["adam", "sgd", "adagrad", "ema", "grad_norm"]


@pytest.fixture(scope="module", params=OPS)
def kernels(request):
    nvcc = ptxas.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI")
    return ptxas.kernels(ptxas.ROOT / "csrc" / "cuda" / f"{request.param}.cu", "sm_90", nvcc)


def test_nothing_spills(kernels):
    assert not {k.name: (k.stack_bytes, k.spill_bytes) for k in kernels if k.stack_bytes or k.spill_bytes}
    assert not [k.name for k in kernels for access in k.accesses if ".local" in access]


def test_three_blocks_fit_on_a_multiprocessor(kernels):
    """65536 registers, 128 threads in a block: so much must be under way to hide the memory's latency."""
    updates = [k for k in kernels if k.name.startswith("cuda::update<")]
    assert all(k.registers <= 65536 // (3 * 128) // 8 * 8 for k in updates)


def test_float32_moves_16_bytes_at_a_time(kernels):
    for kernel in kernels:
        if "float>" in kernel.name:
            assert [access for access in kernel.accesses if access.startswith("ld.") and ".v4." in access], kernel.name
            assert [access for access in kernel.accesses if access.startswith("st.") and ".v4." in access], kernel.name
