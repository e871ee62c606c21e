"""What the calls of the multi-tensor ops have in common beside their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bigmodel import _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.ops._table import Table, Tensors

_SCRATCH_PER_ROW = 4  # float64
_CLASSES = (Tensor, Parameter)


def direct(*lists: Sequence[Tensor]) -> bool:
    """Whether a call may skip torch's dispatcher: the first tensor of a list speaks for the device of all.

    But any of them may be of a class without memory of its own, or a view with the negative bit.
    """
    if not _registry.direct([tensors[0] for tensors in lists if tensors]):
        return False
    try:
        return _registry._C.all_plain(Tensor.is_neg, _CLASSES, lists)
    except TypeError:
        return True  # no tensor: what builds the table says which


def split_rate(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """(lr, None), or (0, tensor) for one that lives on an accelerator and must not be waited for."""
    if not isinstance(lr, Tensor):
        return float(lr), None
    return (0.0, lr) if not lr.is_cpu or not _registry.direct([lr]) else (float(lr), None)


def scalar(op: str, name: str, value: Tensor | None, table: Table, dtypes: Sequence[torch.dtype]) -> int:
    """The address of a scalar that the kernel reads, 0 for None."""
    if value is None:
        return 0
    if value.dtype not in dtypes or value.numel() != 1 or value.device != table.device:
        raise ValueError(
            f"{op}: {name} is {value.dtype} with {value.numel()} elements on '{value.device}'; it must be one element "
            f"of {' or '.join(map(str, dtypes))} on '{table.device}'."
        )
    return value.data_ptr()


def control(op: str, table: Table, factor: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None):
    """The addresses of GradControl in csrc/table.h."""
    return [
        scalar(op, "grad_factor", factor, table, (torch.float64,)),
        scalar(op, "grad_scale", grad_scale, table, (torch.float32,)),
        scalar(op, "found_inf", found_inf, table, (torch.float32,)),
    ]


def rate(op: str, table: Table, lr: float, lr_tensor: Tensor | None) -> tuple[float, int, int]:
    """The members of Rate in csrc/table.h."""
    if lr_tensor is None:
        return lr, 0, 0
    return 0.0, scalar(op, "lr", lr_tensor, table, (torch.float32, torch.float64)), DTYPE_CODES[lr_tensor.dtype]


def scratch(table: Table, native: Any) -> int:
    """The address of an accelerator's memory for what is computed once per row; the CPU keeps its own."""
    if native is _registry._C.cpu:
        return 0
    # A graph keeps the address but not the tensor: only what is allocated during its capture stays the graph's.
    if table.scratch is None or _registry.capturing(table.device):
        table.scratch = torch.empty(table.rows * _SCRATCH_PER_ROW, dtype=torch.float64, device=table.device)
    return table.scratch.data_ptr()


def wrote(*lists: Tensors) -> None:
    """Bumps the version counters of every tensor, so that autograd knows what it saved has changed."""
    torch.autograd.graph.increment_version(_registry._C.flatten(lists))
