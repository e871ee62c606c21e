"""Fixtures and the accuracy rule that every op's tests share (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_host
import ptxas
import pytest
import torch

from bigmodel import _native

ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and none is seen")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda-host", "cuda-ptx", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where a test runs: "cuda-host" is the CUDA kernels on CPU memory, executed and checked by tests/cuda_host, and
    "cuda-ptx" the same with nvcc's code for them."""
    if request.param in ("cuda-host", "cuda-ptx"):
        with cuda_host.as_cpu(ptx=request.param == "cuda-ptx"):
            yield "cpu"
    else:
        yield request.param


@pytest.fixture(scope="module", params=["g++", "nvcc"])
def either_compiler(request) -> Iterator[None]:
    """What cuda_host executes: the kernels as g++ compiles them, or nvcc's PTX."""
    if request.param == "g++":
        yield
        return
    executor = cuda_host.load()
    with cuda_host.executing_ptx(executor, ptxas.SOURCES, range(len(executor.devices))):
        yield


@pytest.fixture(params=_native.load().cpu.isas_usable())
def isa(request) -> str:
    """Every instruction set that this processor has, in turn."""
    cpu = _native.load().cpu
    device = request.node.callspec.params.get("device", "cpu")
    if device != "cpu" and request.param != cpu.isas_usable()[0]:
        pytest.skip("the CUDA kernels know no CPU instruction sets")
    before = cpu.isa_chosen()
    cpu.choose_isa(request.param)
    yield request.param
    cpu.choose_isa(before)


def relative_rms(error: torch.Tensor, reference: torch.Tensor) -> float:
    return float(error.square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(1e-300))


def assert_accurate(
    ours: torch.Tensor,
    stock: torch.Tensor,
    exact: torch.Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> None:
    """max |ours - f64| <= 2 max |stock - f64| + atol max |f64|, and the relative RMS error at most 1.1 times stock's.

    `dtype`, the coarsest rounding on the way, chooses atol; None for the result's own. Over a few rows the second rule
    compares the luck of two roundings of one statistic per row, so two ulp are granted to it unless `strict`, for
    results of thousands of rows; of fewer than 32 elements it says nothing. For float64 the reference is no better than
    what it judges, and the first rule stands alone.
    """
    dtype = dtype or ours.dtype
    assert ours.shape == exact.shape, what
    if not exact.numel():
        return
    ours, stock = ours.detach().double(), stock.detach().double()
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    ours_error, stock_error = (ours - exact).abs(), (stock - exact).abs()
    bound = 2 * stock_error.max() + ATOL[dtype] * exact.abs().max()
    assert ours_error.max() <= bound, f"{what}: error {ours_error.max():.3g} over {bound:.3g}"
    if dtype is torch.float64 or exact.numel() < 32:
        return
    ours_rms, stock_rms = relative_rms(ours_error, exact), relative_rms(stock_error, exact)
    granted = 0 if strict else 2 * torch.finfo(dtype).eps
    assert ours_rms <= max(1.1 * stock_rms, granted), f"{what}: RMS error {ours_rms:.3g}, stock's {stock_rms:.3g}"
