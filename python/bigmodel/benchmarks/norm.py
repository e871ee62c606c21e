"""Cases of the norm row: the public functions as a training step calls them, and the kernels alone.

Bytes that must move, each tensor once, for rows x cols elements of s bytes (statistics are float32, 4 bytes, and 8 for
float64):

    forward             rows * cols * 2s  input, out              + cols * s  weight (layer_norm: and bias)
    saved for backward  rows * 4  rstd (layer_norm: and mean), written by the forward, read by the backward
    backward            rows * cols * 3s  grad_out, x, grad_x     + cols * 2s  weight, grad_weight (and grad_bias)
    with a residual     rows * cols * 2s  residual, summed, in the forward; rows * cols * s  grad_summed in the backward

input and residual have one gradient, counted once; autograd's own copy of it into a second leaf is nobody's need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

import bigmodel
from bigmodel import _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.benchmarks import contenders
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal
from bigmodel.benchmarks.harness import COPY, FLOATS, FURTHER, OURS, Case, Contender, Workload

EPS = 1e-5
LARGE, SMALL, TINY = (8192, 4096), (64, 4096), (1, 64)
SWEEP_LENGTHS = tuple(2**k for k in range(8, 17))
SWEEP_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}  # beyond the L2 cache of either: 32 MB and 512 MB in float32
OPS = ("rms_norm", "layer_norm", "add_rms_norm")
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
FORWARD_KERNEL, BACKWARD_KERNEL = "forward kernel", "backward kernel"


def bytes_moved(op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """The bytes of the table above."""
    rows, cols = shape
    matrix, vector = rows * cols * dtype.itemsize, cols * dtype.itemsize
    affine = 2 if op == "layer_norm" else 1
    statistics = affine * rows * max(dtype.itemsize, 4)
    residual = op == "add_rms_norm"
    forward = matrix * (4 if residual else 2) + vector * affine
    backward = matrix * (4 if residual else 3) + vector * (1 + affine) + statistics
    return {
        FORWARD: forward,
        FORWARD_KERNEL: forward + statistics,
        BACKWARD: backward,
        BACKWARD_KERNEL: backward,
        BOTH: forward + statistics + backward,
    }[mode]


# --- contenders: every function takes the arguments of bigmodel's own ---------------------------------------------


def _stock_add_rms_norm(x, residual, shape, weight, eps):
    summed = x + residual
    return F.rms_norm(summed, shape, weight, eps), summed


def _liger(op: str) -> Callable:
    from liger_kernel.transformers import functional as liger

    # in_place=True, Liger's default, would write into the gradient that all contenders share.
    functions: dict[str, Callable] = {
        "rms_norm": lambda x, shape, w, eps: liger.liger_rms_norm(x, w, eps, in_place=False),
        "layer_norm": lambda x, shape, w, b, eps: liger.liger_layer_norm(x, w, b, eps),
        "add_rms_norm": lambda x, r, shape, w, eps: liger.liger_fused_add_rms_norm(x, r, w, eps, in_place=False),
    }
    return functions[op]


def _quack(op: str) -> Callable:
    from quack import rmsnorm

    functions: dict[str, Callable] = {
        "rms_norm": lambda x, shape, w, eps: rmsnorm(x, w, eps=eps),
        "add_rms_norm": lambda x, r, shape, w, eps: rmsnorm(x, w, residual=r, eps=eps, prenorm=True),
    }
    return functions[op]


def _apex(op: str) -> Callable:
    from apex.normalization import fused_layer_norm as apex

    functions: dict[str, Callable] = {
        "rms_norm": lambda x, shape, w, eps: apex.fused_rms_norm_affine(x, w, shape, eps),
        "layer_norm": lambda x, shape, w, b, eps: apex.fused_layer_norm_affine(x, w, b, shape, eps),
    }
    return functions[op]


def _transformer_engine(op: str) -> Callable:
    from transformer_engine.pytorch import LayerNorm, RMSNorm

    @cache
    def module(shape):
        return (LayerNorm if op == "layer_norm" else RMSNorm)(shape, eps=EPS, device="meta")

    def call(x, shape, weight, *rest):
        values = {"weight": weight} if op == "rms_norm" else {"weight": weight, "bias": rest[0]}
        return torch.func.functional_call(module(shape), values, (x,))

    return call


def _flash_attn(op: str) -> Callable:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    functions: dict[str, Callable] = {
        "rms_norm": lambda x, shape, w, eps: rms_norm_fn(x, w, None, eps=eps),
        "layer_norm": lambda x, shape, w, b, eps: layer_norm_fn(x, w, b, eps=eps),
        "add_rms_norm": lambda x, r, shape, w, eps: rms_norm_fn(x, w, None, residual=r, eps=eps, prenorm=True),
    }
    return functions[op]


STOCK: dict[str, Callable] = {"rms_norm": F.rms_norm, "layer_norm": F.layer_norm, "add_rms_norm": _stock_add_rms_norm}


# Peers run on CUDA only. quack's layer norm and apex's residual addition have no gradient to time.
PEERS = {
    "liger": ("liger_kernel", OPS, _liger),
    "quack": ("quack", ("rms_norm", "add_rms_norm"), _quack),
    "apex": ("apex", ("rms_norm", "layer_norm"), _apex),
    "transformer_engine": ("transformer_engine", ("rms_norm", "layer_norm"), _transformer_engine),
    "flash_attn": ("flash_attn", OPS, _flash_attn),
}


def _contenders(op: str, device: str) -> tuple[str, ...]:
    peers = [
        name
        for name, (module, ops, _) in PEERS.items()
        if device == "cuda" and op in ops and importlib.util.find_spec(module)
    ]
    return (OURS, "stock", "compile", *peers)


def _function(name: str, op: str) -> Callable:
    if name == OURS:
        return getattr(bigmodel, op)
    if name == "stock":
        return STOCK[op]
    if name == "compile":
        return contenders.compiled(STOCK[op])
    return PEERS[name][2](op)


# --- workloads ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensors:
    """What one case computes on; a residual only for add_rms_norm, a bias only for layer_norm."""

    op: str
    shape: tuple[int, int]
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    grads: list[Tensor]  # of out and, with a residual, of summed

    @classmethod
    def draw(cls, op: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> _Tensors:
        normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
        residual = normal(shape) if op == "add_rms_norm" else None
        bias = normal(shape[1]) if op == "layer_norm" else None
        grads = [normal(shape) for _ in range(1 if residual is None else 2)]
        return cls(op, shape, normal(shape), residual, normal(shape[1]), bias, grads)

    @property
    def inputs(self) -> list[Tensor]:
        return _present(self.x, self.residual, self.weight, self.bias)

    @property
    def args(self) -> list:
        """The arguments of the public function."""
        return [*_present(self.x, self.residual), (self.shape[1],), *_present(self.weight, self.bias), EPS]

    def double(self) -> _Tensors:
        """Leaves in float64 with the same values."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        return replace(
            self,
            x=leaf(self.x),
            residual=None if self.residual is None else leaf(self.residual),
            weight=leaf(self.weight),
            bias=None if self.bias is None else leaf(self.bias),
            grads=[grad.double() for grad in self.grads],
        )

    def statistics(self) -> tuple[Tensor | None, Tensor]:
        """mean (layer_norm only) and rstd of the rows, as a forward saves them: float32, float64 for float64."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        x = self.x.double() if self.residual is None else self.x.double() + self.residual
        if self.op == "layer_norm":
            return x.mean(-1).to(wide), (x.var(-1, correction=0) + EPS).rsqrt().to(wide)
        return None, (x.square().mean(-1) + EPS).rsqrt().to(wide)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _reference(t: _Tensors) -> list[Tensor]:
    """The outputs by the formula; written out, because a stock function may take a shortcut of its own."""
    x = t.x if t.residual is None else t.x + t.residual
    centred = x - x.mean(-1, keepdim=True) if t.op == "layer_norm" else x
    out = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * t.weight
    if t.bias is not None:
        out = out + t.bias
    return [out] if t.residual is None else [out, x]


def _build(op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Workload:
    tensors = _Tensors.draw(op, dtype, shape, device)
    exact = tensors.double()
    if mode in (FORWARD, FORWARD_KERNEL):
        with torch.no_grad():
            expected = _reference(exact)
        if mode == FORWARD_KERNEL:
            return Workload(lambda name: _forward_kernel(tensors), expected)
        return Workload(lambda name: contenders.forward(_function(name, op), tensors.args), expected)

    outputs = _reference(exact)
    gradients = list(torch.autograd.grad(outputs, exact.inputs, exact.grads))
    if mode == BACKWARD_KERNEL:
        if tensors.residual is not None:
            del gradients[1]  # the kernel writes one gradient for input and residual
        return Workload(lambda name: _backward_kernel(tensors), gradients)
    for leaf in tensors.inputs:
        leaf.requires_grad_()
    make = contenders.backward if mode == BACKWARD else contenders.forward_backward
    expected = gradients if mode == BACKWARD else [output.detach() for output in outputs] + gradients
    return Workload(lambda name: make(_function(name, op), tensors.args, tensors.inputs, tensors.grads), expected)


def _forward_kernel(t: _Tensors) -> Contender:
    mean, rstd = t.statistics()
    out = torch.zeros_like(t.x)
    summed = None if t.residual is None else torch.zeros_like(t.x)
    rows, cols = t.shape
    launch = partial(
        getattr(_registry.native(t.x), f"{t.op.removeprefix('add_')}_forward"),
        *map(_registry.pointer, (out, summed, mean, rstd, t.x, t.residual, t.weight, t.bias)),
        *(rows, cols, cols, cols),
        *[DTYPE_CODES[t.x.dtype]] * 5,
        *(EPS, 0.0),
    )
    return contenders.kernel(launch, t.x, _present(out, summed), buffers=[mean, rstd, *t.inputs])


def _backward_kernel(t: _Tensors) -> Contender:
    mean, rstd = t.statistics()
    saved = t.x if t.residual is None else t.x + t.residual
    grad_out, grad_summed = t.grads if t.residual is not None else (*t.grads, None)
    native = _registry.native(t.x)
    rows, cols = t.shape
    blocks = native.norm_backward_blocks(rows, cols, _registry.place(t.x)[0])
    partials = torch.zeros(blocks, 2, cols, dtype=rstd.dtype, device=t.x.device)
    grad_x, grad_weight = torch.zeros_like(t.x), torch.zeros_like(t.weight)
    grad_bias = None if t.bias is None else torch.zeros_like(t.bias)
    addresses = (
        *(grad_x, None, grad_weight, grad_bias, partials),
        *(grad_out, grad_summed, saved, mean, rstd, t.weight, None),
    )
    launch = partial(
        getattr(native, f"{t.op.removeprefix('add_')}_backward"),
        *map(_registry.pointer, addresses),
        *(rows, cols, cols, cols, cols),
        *[DTYPE_CODES[t.x.dtype]] * 4,
        *(0.0, False),
    )
    buffers = [partials, saved, mean, rstd, t.weight, *t.grads]
    return contenders.kernel(launch, t.x, _present(grad_x, grad_weight, grad_bias), buffers)


# --- the group: what `bigmodel bench norm` measures and is held to ------------------------------------------------


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda".

    Args:
        quick: the few that fit in half a minute on 2 CPU cores.
        sweep: with the row lengths of the chart.
    """
    if quick:
        chosen = [(op, BOTH, dtype, SMALL) for op in ("rms_norm", "layer_norm") for dtype in FLOATS]
        chosen += [("rms_norm", mode, dtype, LARGE) for dtype in FLOATS for mode in (FORWARD_KERNEL, BACKWARD_KERNEL)]
        chosen += [("layer_norm", mode, torch.float32, TINY) for mode in (FORWARD, BOTH)]
    else:
        modes = (BOTH, FORWARD_KERNEL, BACKWARD_KERNEL, FORWARD)  # what tells most first: time may run out
        chosen = [(op, m, dtype, size) for size in (LARGE, SMALL) for m in modes for op in OPS for dtype in FLOATS]
        chosen += [(op, mode, torch.float32, TINY) for op in ("layer_norm", "rms_norm") for mode in (FORWARD, BOTH)]
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
    shapes = [(SWEEP_ELEMENTS[device] // cols, cols) for cols in lengths]
    return [
        (op, mode, dtype, shape)
        for op in ("rms_norm", "layer_norm")
        for dtype in dtypes
        for mode in modes
        for shape in shapes
    ]


def goals(device: str) -> list[Goal]:
    """What the row promises on a kind of device."""
    return _cpu_goals() if device == "cpu" else _cuda_goals()


def _cpu_goals() -> list[Goal]:
    def stock(op, dtype, shape, pages, limit):
        case = _case("cpu", op, BOTH, dtype, shape)
        return Goal(f"{case.name} against stock, {pages}", pages, case.name, "stock", limit)

    float32, bfloat16 = FLOATS
    result = [
        stock("rms_norm", float32, LARGE, DEFAULT_PAGES, 12),
        stock("rms_norm", bfloat16, LARGE, DEFAULT_PAGES, 30),
        *(stock("rms_norm", dtype, SMALL, DEFAULT_PAGES, 10) for dtype in FLOATS),
        *(stock("layer_norm", dtype, size, DEFAULT_PAGES, 4) for size in (LARGE, SMALL) for dtype in FLOATS),
        stock("rms_norm", float32, LARGE, HUGE_PAGES, 6),
        stock("rms_norm", bfloat16, LARGE, HUGE_PAGES, 15),
        *(stock("layer_norm", dtype, LARGE, HUGE_PAGES, 2.5) for dtype in FLOATS),
    ]
    for pages in (DEFAULT_PAGES, HUGE_PAGES):
        for op in ("rms_norm", "layer_norm"):
            for dtype in FLOATS:
                for size in (LARGE, SMALL):
                    case = _case("cpu", op, BOTH, dtype, size).name
                    text = f"{op} {BOTH} against torch.compile, {pages}"
                    result.append(Goal(text, pages, case, "compile", 3))
                for mode in (FORWARD_KERNEL, BACKWARD_KERNEL):
                    case = _case("cpu", op, mode, dtype, LARGE).name
                    text = f"{op} {mode} alone against a copy, {pages}"
                    result.append(Goal(text, pages, case, COPY, 0.9))
    for mode, limit in ((FORWARD, 1.5), (BOTH, 1.2)):
        case = _case("cpu", "layer_norm", mode, torch.float32, TINY).name
        result.append(Goal(f"{case} against stock", DEFAULT_PAGES, case, "stock", limit, at_most=True))
    return result


def _cuda_goals() -> list[Goal]:
    result = []
    for op, mode, dtype, shape in _sweep("cuda"):
        if shape[1] < 1024:
            continue
        case = _case("cuda", op, mode, dtype, shape)
        result.append(Goal(f"{op} {mode} against a copy", DEFAULT_PAGES, case.name, COPY, 0.9))
        result += [
            Goal(f"{op} {mode} ahead of {other}", DEFAULT_PAGES, case.name, other, 1)
            for other in case.contenders
            if other in ("stock", "compile", "liger", "quack")
        ]
    return result
