"""`make traffic`: the memory traffic of the kernels of every row, as the table that docs/results/cuda-traffic.md holds.

Sectors of 32 bytes in global memory and wavefronts in shared memory, and how many of them are more than the fewest that
could carry the same bytes: accesses that are not coalesced, and bank conflicts. No figure is a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ptxas
import torch

from . import as_cpu

BF16 = torch.bfloat16


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The hot path of each row, in the dtypes that training uses; sizes are whole blocks, and small."""
    import bigmodel
    from bigmodel import ops

    def normed(name: str, rows: int, cols: int, dtype: torch.dtype) -> Callable[[], object]:
        x, w = torch.randn(rows, cols).to(dtype).requires_grad_(), torch.ones(cols, dtype=dtype, requires_grad=True)
        return lambda: getattr(bigmodel, name)(x, cols, w).backward(x.detach())

    def softmaxed(cols: int, **options) -> Callable[[], object]:
        x = torch.randn(1, 2, 8, cols).to(BF16).requires_grad_()
        return lambda: bigmodel.attention_softmax(x, **options).backward(x.detach())

    yield "rms_norm (16, 4096) bfloat16", normed("rms_norm", 16, 4096, BF16)
    yield "layer_norm (16, 4096) float32", normed("layer_norm", 16, 4096, torch.float32)
    yield "rms_norm (2, 65536) bfloat16, clusters of 4", normed("rms_norm", 2, 65536, BF16)
    yield "rms_norm (3, 4099) bfloat16, any alignment", normed("rms_norm", 3, 4099, BF16)
    yield "softmax (1, 2, 8, 2048) bfloat16", softmaxed(2048)
    yield "softmax (1, 2, 8, 2048) bfloat16, dropout", softmaxed(2048, dropout_p=0.1)
    yield "softmax (1, 2, 8, 16384) bfloat16, two passes", softmaxed(16384)

    def numbers(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.rand(32768).to(dtype)]

    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}
    step = [torch.ones(())]
    yield "adam, float32", lambda: ops.adam_(numbers(), numbers(), numbers(), numbers(), step, **hyper)
    yield (
        "adam, bfloat16 with a float32 master",
        lambda: ops.adam_(numbers(BF16), numbers(BF16), numbers(), numbers(), step, masters=numbers(), **hyper),
    )
    codes = lambda: [torch.full((32768,), 130, dtype=torch.uint8)]  # noqa: E731
    scales = lambda: [torch.ones(128)]  # noqa: E731
    yield (
        "adam, 8-bit states",
        lambda: ops.adam_(
            numbers(), numbers(), codes(), codes(), step, exp_avg_scales=scales(), exp_avg_sq_scales=scales(), **hyper
        ),
    )
    yield "sgd, float32 with momentum", lambda: ops.sgd_(numbers(), numbers(), numbers(), lr=0.1, momentum=0.9)
    yield "adagrad, float32", lambda: ops.adagrad_(numbers(), numbers(), numbers(), step, lr=0.1)
    yield "ema, float32", lambda: ops.ema_(numbers(), numbers(), 0.9)
    yield "grad_total and grad_scale, bfloat16", lambda: (
        ops.grad_total(numbers(BF16)), ops.grad_scale_(numbers(BF16), torch.tensor(0.5, dtype=torch.float64))
    )  # fmt: skip


def main() -> None:
    ptx = ptxas.find_nvcc() is not None
    print(
        "# Memory traffic of the CUDA kernels\n\nCounted by the host executor, as on an H100, in "
        f"{'the PTX that nvcc makes of them' if ptx else 'what g++ makes of them'}; made by `make traffic`.\n"
    )
    print("| call | kernel | sectors | more than needed | wavefronts | bank conflicts |\n|---|---|---:|---:|---:|---:|")
    with as_cpu(ptx=ptx) as executor:
        for name, call in calls():
            executor.take_traffic()
            call()
            rows = executor.take_traffic()
            for kernel in dict.fromkeys(row.kernel for row in rows):
                cells = []
                for space in ("global", "shared"):
                    own = [row for row in rows if row.kernel == kernel and row.space == space]
                    cost = sum(row.cost for row in own)
                    cells += [str(cost), str(cost - sum(row.least for row in own))]
                print(f"| {name} | `{kernel}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
