"""Adagrad over lists of tensors, in one native call. Formula: csrc/ops/adagrad.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _multi_tensor
from bigmodel.ops._table import Stream, TableCache

_OP = "adagrad_"
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, Tensor(c!)[] steps, Tensor? lr_tensor, "
    "Tensor? grad_factor, Tensor? grad_scale, Tensor? found_inf, float lr, float lr_decay, float weight_decay, "
    "float eps, bool maximize) -> ()"
)


def _body(
    params, grads, sums, steps, lr_tensor, grad_factor, grad_scale, found_inf,
    lr, lr_decay, weight_decay, eps, maximize, cache=None,
):  # fmt: skip
    if not params:
        return
    streams = (
        Stream("params", params),
        Stream("grads", grads, restride=True),
        Stream("sums", sums),
        Stream("steps", steps, (torch.float32, torch.float64), "one"),
    )
    table = _multi_tensor.table(_OP, cache, streams)
    native = _registry.native(params[0])
    native.adagrad(
        table.pointer, table.rows, *_multi_tensor.control(_OP, table, grad_factor, grad_scale, found_inf), maximize,
        *_multi_tensor.rate(_OP, table, lr, lr_tensor), lr_decay, weight_decay, eps,
        _multi_tensor.scratch(table, native), *_registry.place(params[0]),
    )  # fmt: skip
    _multi_tensor.wrote(params, sums, steps)


_ADAGRAD = _registry.register(_OP, _SCHEMA, _body, lambda *arguments: None)


def adagrad_(
    params: Sequence[Tensor], grads: Sequence[Tensor], sums: Sequence[Tensor], steps: Sequence[Tensor], *,
    lr: float | Tensor, lr_decay: float = 0.0, weight_decay: float = 0.0, eps: float = 1e-10, maximize: bool = False,
    grad_factor: Tensor | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    cache: TableCache | None = None,
) -> None:  # fmt: skip
    """One Adagrad step over lists of tensors of one device, in place::

        step += 1
        g = (-1 if maximize else 1) * grad_factor / grad_scale * grad + weight_decay * param
        sum = sum + g^2
        param = param - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

    Duchi, Hazan, Singer (2011). Arithmetic is float32, float64 for a float64 parameter.

    Args:
        sums: the squares so far, any dtype, with their parameter's strides.
        params, grads, steps, lr, grad_factor, grad_scale, found_inf, cache: as in `adam_`.

    Raises:
        TypeError, ValueError: as in `adam_`.
    """
    lists = {"params": params, "grads": grads, "sums": sums, "steps": steps}
    scalars = {"grad_factor": grad_factor, "grad_scale": grad_scale, "found_inf": found_inf}
    direct = _multi_tensor.direct(_OP, cache, lists, "grads", scalars=scalars)
    lr_decay, eps = _check.number(_OP, "lr_decay", lr_decay), _check.number(_OP, "eps", eps)
    weight_decay = _check.number(_OP, "weight_decay", weight_decay)
    _check.flag(_OP, "maximize", maximize)
    lr, lr_tensor = _multi_tensor.split_rate(_OP, lr)
    arguments = (
        params, grads, sums, steps, lr_tensor, grad_factor, grad_scale, found_inf,
        lr, lr_decay, weight_decay, eps, maximize,
    )  # fmt: skip
    if direct:
        _body(*arguments, cache)
    else:
        _registry.dispatch(_ADAGRAD, *arguments)
