"""Cases of the softmax row: attention's scores as a training step has them, plain softmax over rows and over columns,
and the kernels alone.

An attention case of rows x keys scores is batch x heads square matrices: causal, or padded (of each sequence of the
batch its own part is live). Bytes that must move, each tensor once, for n elements of s bytes, of which a share f lies
below the diagonal in a causal case (f = 1 elsewhere: where a padding mask ends only the mask tells):

    forward   n * s * (f + 1)   the scores that are live, and out
    backward  n * s * (2f + 1)  y and grad_out where live, and grad_scores
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import bigmodel
from bigmodel import _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.benchmarks import contenders
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal
from bigmodel.benchmarks.harness import COPY, FLOATS, FURTHER, OURS, Case, Contender, Workload

PLAIN, COLUMNS, CAUSAL, PADDED = "softmax", "column_softmax", "causal_softmax", "padded_softmax"
UNMASKED = (PLAIN, COLUMNS)
LARGE, SQUARE, SMALL = (8192, 4096), (4096, 4096), (64, 4096)
SHORT_KEYS, LONG_KEYS = (32768, 512), (8192, 2048)  # 64 and 4 matrices
SWEEP_LENGTHS = tuple(2**k for k in range(8, 17))
MOST_KEYS_OF_A_GOAL = 2**15
SWEEP_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}  # beyond the L2 cache of either: 32 MB and 512 MB in float32
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
FORWARD_KERNEL, BACKWARD_KERNEL = "forward kernel", "backward kernel"
MODES = (FORWARD, BOTH)
SCALE = 0.125
_UNLIMITED = 2**63 - 1  # kUnlimited of csrc/ops/softmax.h


def bytes_moved(op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """The bytes of the table above."""
    rows, keys = shape
    elements = rows * keys
    live = elements * (keys + 1) // (2 * keys) if op == CAUSAL else elements
    forward, backward = live + elements, 2 * live + elements
    moved = {FORWARD: forward, FORWARD_KERNEL: forward, BACKWARD: backward, BACKWARD_KERNEL: backward}
    return dtype.itemsize * moved.get(mode, forward + backward)


def score_shape(op: str, shape: tuple[int, int]) -> tuple[int, ...]:
    """(batch, heads, queries, keys) of an attention case."""
    rows, keys = shape
    if op in UNMASKED:
        return shape
    matrices = rows // keys
    batch = 4 if matrices >= 16 else 2
    return batch, matrices // batch, keys, keys


def live_of(op: str, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The boolean mask of a case: (keys, keys) causal, (batch, 1, 1, keys) padded, of lengths down to a half."""
    if op in UNMASKED:
        return None
    batch, _, _, keys = score_shape(op, shape)
    if op == CAUSAL:
        return torch.ones(keys, keys, dtype=torch.bool, device=device).tril()
    lengths = keys - keys // (2 * batch) * torch.arange(1, batch + 1, device=device)
    return (torch.arange(keys, device=device) < lengths[:, None])[:, None, None]


# --- contenders: each is made of a case's mask, and takes the scores ------------------------------------------------


def _dim(op: str) -> int:
    return 0 if op == COLUMNS else -1


def _ours(op: str, live: Tensor | None) -> Callable:
    if op in UNMASKED:
        return partial(bigmodel.softmax, dim=_dim(op))
    if op == CAUSAL:
        return partial(bigmodel.attention_softmax, scale=SCALE, causal=True)
    return partial(bigmodel.attention_softmax, scale=SCALE, mask=live)


def _stock(op: str, live: Tensor | None) -> Callable:
    if live is None:
        return partial(torch.softmax, dim=_dim(op))
    excluded = ~live

    def call(scores: Tensor) -> Tensor:
        return torch.softmax((scores * SCALE).masked_fill(excluded, -torch.inf), -1)

    return call


def _liger(op: str, live: Tensor | None) -> Callable:
    from liger_kernel.transformers.functional import liger_softmax

    return liger_softmax


def _quack(op: str, live: Tensor | None) -> Callable:
    from quack import softmax

    return softmax


PEERS = {"liger": ("liger_kernel", _liger), "quack": ("quack", _quack)}  # plain softmax on CUDA


def _contenders(op: str, device: str) -> tuple[str, ...]:
    wanted = PEERS if device == "cuda" and op == PLAIN else {}
    peers = [name for name, (module, _) in wanted.items() if importlib.util.find_spec(module)]
    return (OURS, "stock", "compile", *peers)


def _function(name: str, op: str, live: Tensor | None) -> Callable:
    if name == OURS:
        return _ours(op, live)
    if name == "stock":
        return _stock(op, live)
    if name == "compile":
        return contenders.compiled(_stock(op, live))
    return PEERS[name][1](op, live)


# --- workloads ----------------------------------------------------------------------------------------------------


def _build(op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Workload:
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
    size, live = score_shape(op, shape), live_of(op, shape, device)
    scores, grad = normal(size), normal(size)
    z = scores.double() if live is None else (scores.double() * SCALE).masked_fill_(~live, -torch.inf)
    y = torch.softmax(z, _dim(op))
    del z
    if mode in (FORWARD, FORWARD_KERNEL):
        if mode == FORWARD_KERNEL:
            return Workload(lambda name: _forward_kernel(op, scores, live), [y])
        return Workload(lambda name: contenders.forward(_function(name, op, live), [scores]), [y])

    gradient = y * (grad.double() - (grad.double() * y).sum(_dim(op), keepdim=True))
    if live is not None:
        gradient *= SCALE
    if mode == BACKWARD_KERNEL:
        return Workload(lambda name: _backward_kernel(op, y.to(dtype), grad), [gradient])
    scores.requires_grad_()
    make = contenders.backward if mode == BACKWARD else contenders.forward_backward
    expected = [gradient] if mode == BACKWARD else [y, gradient]
    return Workload(lambda name: make(_function(name, op, live), [scores], [scores], [grad]), expected)


def _rows(op: str, scores: Tensor) -> tuple:
    """SoftmaxRows of csrc/ops/softmax.h."""
    *dims, keys = (1,) * (5 - scores.dim()) + tuple(scores.shape)
    scale = 1.0 if op == PLAIN else SCALE
    return tuple(dims), keys, _UNLIMITED, 0 if op == CAUSAL else _UNLIMITED, 0, scale, 0.0, 0.0, False


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return (0,) * (5 - tensor.dim()) + tensor.stride()[:-1]


def _forward_kernel(op: str, scores: Tensor, live: Tensor | None) -> Contender:
    out = torch.zeros_like(scores)
    mask = live if op == PADDED else None
    mask_strides = (0, mask.stride(0), 0, 0) if mask is not None else (0, 0, 0, 0)
    code = DTYPE_CODES[scores.dtype]
    launch = partial(
        _registry.native(scores).attention_softmax_forward,
        *map(_registry.pointer, (out, None, None, scores, mask, None, None)),
        *(_rows(op, scores), _strides(out), _strides(scores), mask_strides, 1, code, code, -1, False),
    )
    return contenders.kernel(launch, scores, [out], buffers=[scores, mask])


def _backward_kernel(op: str, y: Tensor, grad: Tensor) -> Contender:
    out = torch.zeros_like(y)
    code, none = DTYPE_CODES[y.dtype], (0, 0, 0, 0)
    launch = partial(
        _registry.native(y).attention_softmax_backward,
        *map(_registry.pointer, (out, None, None, None, grad, y, None, None)),
        *(_rows(op, y), _strides(grad), none, (1, 1, 1, 1), 1, code, code),
    )
    return contenders.kernel(launch, y, [out], buffers=[grad, y])


# --- the group: what `bigmodel bench softmax` measures and is held to ---------------------------------------------


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda".

    Args:
        quick: the few that fit in a minute on 2 CPU cores.
        sweep: with the row lengths of the chart.
    """
    if quick:
        chosen = [(op, BOTH, dtype, SHORT_KEYS) for op in (CAUSAL, PADDED) for dtype in FLOATS]
        chosen += [(PLAIN, BOTH, dtype, SMALL) for dtype in FLOATS]
    else:
        attention = [(op, size) for size in (SHORT_KEYS, LONG_KEYS) for op in (CAUSAL, PADDED)]
        chosen = [(op, BOTH, dtype, size) for op, size in attention for dtype in FLOATS]
        chosen += [(PLAIN, mode, dtype, size) for size in (LARGE, SMALL) for mode in MODES for dtype in FLOATS]
        chosen += [(COLUMNS, BOTH, dtype, SQUARE) for dtype in FLOATS]
        kernels = (FORWARD_KERNEL, BACKWARD_KERNEL)
        chosen += [
            (op, mode, dtype, size)
            for op, size in ((PLAIN, LARGE), (CAUSAL, SHORT_KEYS))
            for mode in kernels
            for dtype in FLOATS
        ]
    result = [_case(device, *which) for which in chosen]
    if sweep:
        result += [_case(device, *which, sweep=True) for which in _sweep(device) + _sweep(device, FURTHER, [4096])]
    return result


def _case(device: str, op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int], sweep: bool = False) -> Case:
    return Case(
        op=op,
        mode=mode,
        dtype=dtype,
        shape=shape,
        bytes=bytes_moved(op, mode, dtype, shape),
        contenders=(OURS,) if mode in (FORWARD_KERNEL, BACKWARD_KERNEL) else _contenders(op, device),
        build=partial(_build, op, mode, dtype, shape),
        launch_bound=shape[0] * shape[1] <= SMALL[0] * SMALL[1],
        sweep=sweep,
    )


def _sweep(
    device: str, dtypes: Sequence[torch.dtype] = FLOATS, lengths: Sequence[int] = SWEEP_LENGTHS
) -> list[tuple[str, str, torch.dtype, tuple[int, int]]]:
    modes = (BOTH,) if device == "cpu" else (FORWARD, BACKWARD)
    shapes = [(SWEEP_ELEMENTS[device] // keys, keys) for keys in lengths]
    return [(PLAIN, mode, dtype, shape) for dtype in dtypes for mode in modes for shape in shapes]


def goals(device: str) -> list[Goal]:
    """What the row promises on a kind of device."""
    return _cpu_goals() if device == "cpu" else _cuda_goals()


def _cpu_goals() -> list[Goal]:
    result = []
    for pages, limit in ((DEFAULT_PAGES, 5.0), (HUGE_PAGES, 3.0)):
        for against, least in (("stock", limit), ("compile", 3.0)):
            text = f"scale + mask + softmax, {BOTH}, against {against}, {pages}"
            result += [
                Goal(text, pages, _case("cpu", op, BOTH, dtype, size).name, against, least)
                for op in (CAUSAL, PADDED)
                for size in (SHORT_KEYS, LONG_KEYS)
                for dtype in FLOATS
            ]
    for size, least in ((LARGE, 2.5), (SMALL, 1.2)):
        for dtype in FLOATS:
            case = _case("cpu", PLAIN, BOTH, dtype, size).name
            result.append(Goal(f"{case} against stock, {DEFAULT_PAGES}", DEFAULT_PAGES, case, "stock", least))
    return result


def _cuda_goals() -> list[Goal]:
    result = []
    for op, mode, dtype, shape in _sweep("cuda"):
        if shape[1] > MOST_KEYS_OF_A_GOAL:
            continue
        case = _case("cuda", op, mode, dtype, shape)
        share = 0.9 if mode == FORWARD else 0.85
        result.append(Goal(f"{op} {mode} against a copy", DEFAULT_PAGES, case.name, COPY, share))
        result += [
            Goal(f"{op} {mode} ahead of {other}", DEFAULT_PAGES, case.name, other, 1)
            for other in case.contenders
            if other != OURS
        ]
    return result
