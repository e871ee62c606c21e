"""Stochastic gradient descent over lists of tensors, in one native call. Formula: csrc/ops/sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _multi_tensor
from bigmodel.ops._table import Stream, TableCache

_OP = "sgd_"
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] started, Tensor? lr_tensor, "
    "Tensor? grad_factor, Tensor? grad_scale, Tensor? found_inf, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize) -> ()"
)


def _body(
    params, grads, momentum_buffers, started, lr_tensor, grad_factor, grad_scale, found_inf,
    lr, momentum, dampening, weight_decay, nesterov, maximize, cache=None,
):  # fmt: skip
    if not params:
        return
    streams = (
        Stream("params", params),
        Stream("grads", grads, restride=True),
        Stream("momentum_buffers", momentum_buffers, optional=True),
        Stream("started", started, (torch.float32,), "one", optional=True),
    )
    table = _multi_tensor.table(_OP, cache, streams)
    native = _registry.native(params[0])
    native.sgd(
        table.pointer, table.rows, *_multi_tensor.control(_OP, table, grad_factor, grad_scale, found_inf), maximize,
        *_multi_tensor.rate(_OP, table, lr, lr_tensor), momentum, dampening, weight_decay, nesterov,
        _multi_tensor.scratch(table, native), *_registry.place(params[0]),
    )  # fmt: skip
    _multi_tensor.wrote(params, momentum_buffers, started)


_SGD = _registry.register(_OP, _SCHEMA, _body, lambda *arguments: None)


def sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor] = (),
    started: Sequence[Tensor] = (), *, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False, grad_factor: Tensor | None = None,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None, cache: TableCache | None = None,
) -> None:  # fmt: skip
    """One step of stochastic gradient descent over lists of tensors of one device, in place::

        g = (-1 if maximize else 1) * grad_factor / grad_scale * grad + weight_decay * param
        buffer = g in the first step, then momentum * buffer + (1 - dampening) * g
        param = param - lr * (g + momentum * buffer if nesterov else buffer)

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), as torch.optim.SGD
    has it. Arithmetic is float32, float64 for a float64 parameter.

    Args:
        params, grads: as in `adam_`.
        momentum_buffers: one for each parameter, zeros at first; empty without momentum.
        started: one float32 element for each, 0 before the first step, which sets it to 1; empty where every buffer has
            begun, or without dampening, where a buffer of zeros gives the same.
        lr, grad_factor, grad_scale, found_inf, cache: as in `adam_`.

    Raises:
        TypeError, ValueError: as in `adam_`; momentum without momentum_buffers, or these without it.
    """
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "started": started}
    scalars = {"grad_factor": grad_factor, "grad_scale": grad_scale, "found_inf": found_inf}
    direct = _multi_tensor.direct(_OP, cache, lists, "grads", scalars=scalars)
    momentum, dampening = _check.number(_OP, "momentum", momentum), _check.number(_OP, "dampening", dampening)
    weight_decay = _check.number(_OP, "weight_decay", weight_decay)
    _check.flag(_OP, "nesterov", nesterov)
    _check.flag(_OP, "maximize", maximize)
    if bool(momentum_buffers) != (momentum != 0):
        raise ValueError(
            f"{_OP}: momentum is {momentum}, but {len(momentum_buffers)} momentum_buffers came; "
            "there must be one for each parameter with momentum, and none without."
        )
    lr, lr_tensor = _multi_tensor.split_rate(_OP, lr)
    arguments = (
        params, grads, momentum_buffers, started, lr_tensor, grad_factor, grad_scale, found_inf,
        lr, momentum, dampening, weight_decay, nesterov, maximize,
    )  # fmt: skip
    if direct:
        _body(*arguments, cache)
    else:
        _registry.dispatch(_SGD, *arguments)
