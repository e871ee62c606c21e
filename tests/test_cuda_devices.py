"""On a real GPU, what the host executor cannot see: which kernels a build for this device runs, and a second device."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import bigmodel

pytestmark = pytest.mark.cuda


def kernels_of(call) -> set[str]:
    """The names of this package's kernels that a call runs, without template arguments."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    if not names:
        pytest.skip("torch.profiler records no kernels here: CUPTI is missing or not permitted")
    return {match[1] for name in names if (match := re.search(r"\bbigmodel::cuda::(\w+)", name))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [1024, 4096, 8192, 16384], ids=["half a block", "2 blocks", "4 blocks", "8 blocks"])
def test_long_rows_take_clusters(dtype, packs):
    """Without them they would go to the kernels named _any: the same bits, so that no other test would see it."""
    major, minor = torch.cuda.get_device_capability()
    if packs > 2048 and major < 9:
        pytest.skip(f"clusters need sm_90, this is sm_{major}{minor}")
    cols = packs * 16 // dtype.itemsize
    x, weight = (torch.randn(size, device="cuda", dtype=dtype, requires_grad=True) for size in ((4, cols), (cols,)))
    grad = torch.randn_like(x)
    for name in ("rms_norm", "layer_norm"):
        ran = kernels_of(lambda name=name: getattr(bigmodel, name)(x, cols, weight).backward(grad))
        assert ran == {"norm_forward", "norm_backward", "norm_reduce"}


SECOND_DEVICE = """
import ctypes

import torch
import bigmodel

def active(device):
    flags, state = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(state)) == 0
    return state.value

x, weight = (torch.randn(size, device="cuda:1", requires_grad=True) for size in ((8, 32768), (32768,)))
grad = torch.randn_like(x)
driver = ctypes.CDLL("libcuda.so.1")
before = active(0)
optimizer = bigmodel.optim.AdamW([x, weight])
bigmodel.rms_norm(x, 32768, weight).backward(grad)
bigmodel.attention_softmax(x, scale=0.5).backward(grad)
optimizer.step()
torch.cuda.synchronize(1)
print(before, active(0), active(1), torch.cuda.current_device())
"""


def test_ops_on_a_second_device_leave_the_first_alone():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device is seen, two are needed")
    command = [sys.executable, "-c", SECOND_DEVICE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, first, second, current = map(int, result.stdout.split())
    assert second and current == 0
    if before:
        pytest.skip("torch itself has made a context on cuda:0")
    assert not first
