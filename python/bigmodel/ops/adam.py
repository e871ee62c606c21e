"""Adam and AdamW over lists of tensors, in one native call. Formulas: csrc/ops/adam.h."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _multi_tensor
from bigmodel.ops._table import Stream, TableCache, Tensors

_OP = "adam_"
_STATES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)
_FLOAT32 = (torch.float32,)
_STEPS = (torch.float32, torch.float64)
_LISTS = (
    "params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "max_exp_avg_sqs", "masters", "emas", "exp_avg_scales",
    "exp_avg_sq_scales",
)  # fmt: skip

_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] masters, Tensor(g!)[] emas, Tensor(h!)[] exp_avg_scales, "
    "Tensor(i!)[] exp_avg_sq_scales, Tensor? lr_tensor, Tensor? grad_factor, Tensor? grad_scale, Tensor? found_inf, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, "
    "float ema_decay, int? seed) -> ()"
)


def streams(
    params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales
):
    """The columns of the op's table, in the order of csrc/ops/adam.h."""
    return (
        Stream("params", params),
        Stream("grads", grads, restride=True),
        Stream("exp_avgs", exp_avgs, _STATES),
        Stream("exp_avg_sqs", exp_avg_sqs, _STATES),
        Stream("max_exp_avg_sqs", max_exp_avg_sqs, optional=True),
        Stream("masters", masters, _FLOAT32, optional=True),
        Stream("emas", emas, optional=True),
        Stream("steps", steps, _STEPS, "one"),
        Stream("exp_avg_scales", exp_avg_scales, _FLOAT32, "scales", optional=True),
        Stream("exp_avg_sq_scales", exp_avg_sq_scales, _FLOAT32, "scales", optional=True),
    )


def _body(
    params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales,
    lr_tensor, grad_factor, grad_scale, found_inf,
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize, ema_decay, seed, cache=None,
):  # fmt: skip
    if not params:
        return
    lists = (
        params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales,
    )  # fmt: skip
    table = _multi_tensor.table(_OP, cache, streams(*lists))
    native = _registry.native(params[0])
    native.adam(
        table.pointer, table.rows, *_multi_tensor.control(_OP, table, grad_factor, grad_scale, found_inf), maximize,
        *_multi_tensor.rate(_OP, table, lr, lr_tensor), beta1, beta2, eps, weight_decay, ema_decay, decoupled,
        seed is not None, (seed or 0) % 2**64, _multi_tensor.scratch(table, native), *_registry.place(params[0]),
    )  # fmt: skip
    _multi_tensor.wrote(
        params, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales
    )


def _present(tensors: Tensors) -> Sequence[Tensor]:
    """A schema has no lists of optional tensors: an empty one stands for one that does not exist."""
    return [torch.empty(0) if tensor is None else tensor for tensor in tensors]


def _dispatched(params, *rest):
    lists = [[None if t.numel() == 0 and p.numel() else t for p, t in zip(params, part, strict=False)]
             for part in rest[4:9]]  # fmt: skip
    _body(params, *rest[:4], *lists, *rest[9:])


_ADAM = _registry.register(_OP, _SCHEMA, _dispatched, lambda *arguments: None)


def adam_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], *, max_exp_avg_sqs: Sequence[Tensor] = (), masters: Tensors = (), emas: Tensors = (),
    exp_avg_scales: Tensors = (), exp_avg_sq_scales: Tensors = (),
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    maximize: bool = False, ema_decay: float = 0.0, grad_factor: Tensor | None = None,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None, seed: int | None = None,
    cache: TableCache | None = None,
) -> None:  # fmt: skip
    """One Adam (AdamW) step over lists of tensors of one device, in place.

    Row i of every list belongs to params[i]; an optional list is empty, or has one tensor (or, where said, None) per
    row. Rows may differ in dtype. Kingma, Ba, arXiv 1412.6980; Loshchilov, Hutter, arXiv 1711.05101; Reddi et al.,
    arXiv 1904.09237; 8-bit states: Dettmers et al., arXiv 2110.02861. With w the master, or else the parameter::

        step += 1
        g = (-1 if maximize else 1) * grad_factor / grad_scale * grad
        w = w * (1 - lr * weight_decay)  if decoupled  else  g = g + weight_decay * w
        exp_avg = exp_avg + (1 - beta1) * (g - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        s = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq), or without that list s = exp_avg_sq
        w = w - lr / (1 - beta1^step) * exp_avg / (sqrt(s) / sqrt(1 - beta2^step) + eps)
        ema = ema + (1 - ema_decay) * (w - ema)
        param = w rounded to its dtype

    Arithmetic is float32, float64 for a float64 parameter; bias corrections are float64.

    Args:
        params: float32, bfloat16, float16 or float64; any dense strides.
        grads: any of those dtypes; one whose strides differ from its parameter's is copied first. Left as they are.
        exp_avgs, exp_avg_sqs: any of those dtypes, with their parameter's strides; or torch.uint8 codes, with these or
            flat in the parameter's order of memory, with `exp_avg_scales` and `exp_avg_sq_scales`.
        steps: one float32 or float64 element each, on the parameters' device.
        max_exp_avg_sqs: for amsgrad; any dtype but 8-bit codes.
        masters: float32 copies, or None in rows without one; the parameter is then written and not read.
        emas: averages of w before it is rounded, of any dtype, or None.
        exp_avg_scales, exp_avg_sq_scales: float32, ceil(numel / 256) elements each, or None in rows without codes.
        lr: a number, or a scalar float32 or float64 tensor (read on its device if that is the parameters').
        decoupled: True for AdamW's weight decay, False for Adam's.
        grad_factor, grad_scale, found_inf: scalars on the parameters' device, float64 and twice float32, read by the
            kernel: what clipping multiplies gradients by, what torch.amp.GradScaler multiplied them by, and whether to
            write nothing at all, steps included, where it is not 0.
        seed: round to bfloat16 and float16 parameters stochastically, with random bits that depend on the seed, the
            row, the step and the element only; None to round to nearest even.
        cache: keeps the table of addresses between calls with the same tensors.

    Raises:
        TypeError, ValueError: one sentence naming the argument and the row. So where, in grad mode, something that
            requires grad would be written; gradients that require grad are read as constants.
    """
    optional = (max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales)
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, *optional)
    direct = _multi_tensor.direct(
        _OP, cache, dict(zip(_LISTS, lists, strict=True)), "grads", _LISTS[5:],
        {"grad_factor": grad_factor, "grad_scale": grad_scale, "found_inf": found_inf},
    )  # fmt: skip
    beta1, beta2 = _check.number(_OP, "beta1", beta1), _check.number(_OP, "beta2", beta2)
    eps, weight_decay = _check.number(_OP, "eps", eps), _check.number(_OP, "weight_decay", weight_decay)
    ema_decay = _check.number(_OP, "ema_decay", ema_decay)
    _check.flag(_OP, "decoupled", decoupled)
    _check.flag(_OP, "maximize", maximize)
    if seed is not None:
        if type(seed) is bool or not hasattr(seed, "__index__"):
            raise TypeError(f"{_OP}: seed must be an int or None, got {_check.kind(seed)}.")
        seed = index(seed)
    lr, lr_tensor = _multi_tensor.split_rate(_OP, lr)
    numbers = (lr, beta1, beta2, eps, weight_decay, decoupled, maximize, ema_decay, seed)
    scalars = (lr_tensor, grad_factor, grad_scale, found_inf)
    if direct:
        _body(*lists, *scalars, *numbers, cache)
    else:
        _registry.dispatch(_ADAM, *lists[:5], *map(_present, optional), *scalars, *numbers)


# --- 8-bit states ---------------------------------------------------------------------------------------------------


def dynamic_code(signed: bool) -> Tensor:
    """The 256 values of an 8-bit state in ascending order, float32: what code 0, 1, ..., 255 stands for.

    0, 1, and for each decade k = 0 ... 6 the midpoints of 2^d equal parts of (0.1, 1], times 10^-k: signed, d = 6 - k
    and all but 0 and 1 with both signs; unsigned, d = 7 - k (Dettmers et al., arXiv 2110.02861).
    """
    values = [0.0, 1.0]
    for k in range(7):
        parts = 2 ** ((6 if signed else 7) - k)
        decade = [10.0**-k * (0.1 + 0.9 * (j + 0.5) / parts) for j in range(parts)]
        values += decade + [-value for value in decade] * signed
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a state: uint8 codes of `values`' shape, one float32 scale for each 256 elements in memory.

    Each takes the nearest code, but unsigned a positive value never that of 0.

    Args:
        values: float32, contiguous; not negative unless `signed`.
    """
    flat = values.detach().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % 256)).view(-1, 256)
    scales = blocks.abs().amax(1)
    code = dynamic_code(signed).to(values.device)
    relative = blocks / scales.where(scales > 0, 1).unsqueeze(1)
    codes = torch.bucketize(relative, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    if not signed:
        codes = codes.where((relative <= 0) | (codes > 0), 1)
    return codes.view(-1)[: flat.numel()].view(values.shape), scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 values that `quantise` gave codes and scales for, in the codes' shape."""
    flat = dynamic_code(signed).to(codes.device)[codes.reshape(-1).int()]
    return (flat * scales.repeat_interleave(256)[: flat.numel()]).view(codes.shape)


def zero_code(signed: bool) -> int:
    """The code of 0: what an 8-bit state begins with, beside scales of 0."""
    return 127 if signed else 0
