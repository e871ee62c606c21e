"""How the multi-tensor CUDA kernels move rows of each dtype, counted by the host executor."""

import cuda_host
import pytest
import torch

from bigmodel.ops import ema_, grad_total

pytestmark = pytest.mark.usefixtures("either_compiler")
ELEMENTS = 2048  # eight tiles of a warp


def traffic(call):
    with cuda_host.as_cpu() as executor:
        executor.take_traffic()
        call()
        return [row for row in executor.take_traffic() if row.space == "global" and row.accesses > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_one_dtype_move_16_bytes_a_lane(dtype):
    average, value = (torch.randn(ELEMENTS, dtype=torch.float64).to(dtype) for _ in range(2))
    rows = traffic(lambda: ema_([average], [value], 0.5)) + traffic(lambda: grad_total([value]))
    wide = [row for row in rows if row.bytes == 16]
    moved = sum(row.bytes * 32 * row.accesses for row in wide)
    assert moved == 4 * average.nbytes, cuda_host.table(rows)  # two read, one written; one read for the norm
    assert not [row for row in wide if row.cost > row.least], cuda_host.table(wide)


def test_16_bits_beside_float32_touch_no_sector_twice():
    average, value = torch.randn(ELEMENTS), torch.randn(ELEMENTS).bfloat16()
    rows = [row for row in traffic(lambda: ema_([average], [value], 0.5)) if row.bytes >= 8]
    assert {row.bytes for row in rows} == {8, 16}
    assert not [row for row in rows if row.cost > row.least], cuda_host.table(rows)
