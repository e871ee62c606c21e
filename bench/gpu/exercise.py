"""Runs every kind of kernel once on small tensors, for compute-sanitizer, which makes each some hundred times slower.

Rows of lengths that take each path: a part of a warp, odd, a block, a cluster, more than a cluster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import bigmodel
from bigmodel import optim
from bigmodel.benchmarks.harness import in_a_line
from bigmodel.benchmarks.journal import Journal

ROWS = 5
LENGTHS = (24, 1001, 4096, 20000, 70000)
DTYPES = (torch.float32, torch.bfloat16)


def _tensor(*shape: int, dtype: torch.dtype, device: str, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def norm(op: str, cols: int, dtype: torch.dtype, device: str) -> None:
    x, weight = _tensor(ROWS, cols, dtype=dtype, device=device), _tensor(cols, dtype=dtype, device=device)
    if op == "add_rms_norm":
        outs = bigmodel.add_rms_norm(x, _tensor(ROWS, cols, dtype=dtype, device=device), cols, weight)
    elif op == "layer_norm":
        outs = (bigmodel.layer_norm(x, (cols,), weight, _tensor(cols, dtype=dtype, device=device)),)
    else:
        outs = (bigmodel.rms_norm(x, cols, weight),)
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def softmax(cols: int, dtype: torch.dtype, device: str) -> None:
    out = bigmodel.softmax(_tensor(ROWS, cols, dtype=dtype, device=device))
    out.backward(torch.randn_like(out))


def attention(options: str, keys: int, dtype: torch.dtype, device: str) -> None:
    scores = _tensor(2, 2, 9, keys, dtype=dtype, device=device)
    live = torch.rand(2, 1, 9, keys, device=device) < 0.7
    given = {
        "causal": {"causal": True, "scale": 0.5},
        "mask": {"mask": live, "softcap": 30.0},
        "window": {"causal": True, "window": (keys // 2, 0), "alibi_slopes": torch.rand(2, device=device)},
        "sinks": {"sinks": _tensor(2, dtype=torch.float32, device=device), "dropout_p": 0.5},
        "added": {"mask": _tensor(2, 1, 9, keys, dtype=dtype, device=device)},
    }[options]
    out = bigmodel.attention_softmax(scores, **given)
    out.backward(torch.randn_like(out))


def step(make: Callable, dtype: torch.dtype, device: str) -> None:
    """Two steps over tensors of one element, odd, and more than a chunk."""
    params = [torch.nn.Parameter(_tensor(size, dtype=dtype, device=device, grad=False)) for size in (1, 1027, 70001)]
    optimizer = make(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def clip(device: str) -> None:
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in (1, 1027, 70001)]
    for param in params:
        param.grad = torch.randn_like(param)
    optim.clip_grad_norm_(params, 1.0)
    layer = torch.nn.Linear(100, 7, device=device)
    optim.EMA(layer, decay=0.9).update()


def exercises(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for cols in LENGTHS:
        for dtype in DTYPES:
            kind = f"{str(dtype).removeprefix('torch.')} {cols}"
            for op in ("rms_norm", "layer_norm", "add_rms_norm"):
                yield f"{op} {kind}", partial(norm, op, cols, dtype, device)
            yield f"softmax {kind}", partial(softmax, cols, dtype, device)
    for options in ("causal", "mask", "window", "sinks", "added"):
        for keys, dtype in ((40, torch.float32), (1000, torch.bfloat16)):
            yield f"attention_softmax {options} {keys}", partial(attention, options, keys, dtype, device)
    float32, bfloat16 = DTYPES
    for name, make, dtype in (
        ("adamw", optim.AdamW, float32),
        ("adamw clipped, averaged", partial(optim.AdamW, max_grad_norm=1.0, ema_decay=0.9, amsgrad=True), float32),
        ("adamw 8-bit", partial(optim.AdamW, state_dtype="8bit"), float32),
        ("adamw masters", partial(optim.AdamW, master_weights=True), bfloat16),
        ("adam", optim.Adam, bfloat16),
        ("sgd", partial(optim.SGD, lr=0.1, momentum=0.9), float32),
        ("adagrad", optim.Adagrad, float32),
    ):
        yield name, partial(step, make, dtype, device)
    yield "clip and average", partial(clip, device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--until", required=True, type=float, help="begin nothing after this time.monotonic()")
    parser.add_argument("--journal", required=True, type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.zeros(1, device=arguments.device).tolist()  # before anything is planned: the tool may refuse the device
    journal = Journal(arguments.journal)
    todo = {f"{arguments.tool}: {name}": run for name, run in exercises(arguments.device)}
    for item in journal.plan(todo):
        if time.monotonic() > arguments.until:
            break
        journal.begin(item)
        try:
            todo[item]()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            journal.error(item, in_a_line(error))
            if arguments.device == "cuda":
                raise  # a process whose context may be broken goes no further
        else:
            journal.end(item)


if __name__ == "__main__":
    main()
