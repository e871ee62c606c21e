"""What the calls of the multi-tensor ops have in common beside their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList

from bigmodel import _check, _registry
from bigmodel._native import DTYPE_CODES
from bigmodel.ops._table import Stream, Table, TableCache, Tensors, build

_SCRATCH_PER_ROW = 4  # float64
_CLASSES = (Tensor, Parameter)


def direct(
    op: str, cache: TableCache | None, lists: Mapping[str, Tensors], read: str = "", optional: Sequence[str] = (),
    scalars: Mapping[str, Any] | None = None,
) -> bool:  # fmt: skip
    """Whether a call may skip torch's dispatcher, which takes a quick look; what neither way can take is refused first.

    Args:
        lists: by argument. The first tensors of the first two speak for the device of all, but any of them may be of a
            class without memory of its own, or a view with the negative bit.
        read: the list that is not written.
        optional: the lists whose entries may be None.
        scalars: tensors or None, by argument.
    """
    for name, tensors in lists.items():
        if type(tensors) is not list and type(tensors) is not tuple:
            _check_sequence(op, name, tensors)
    if cache is not None and not isinstance(cache, TableCache):
        raise TypeError(f"{op}: cache must be a bigmodel.ops.TableCache or None, got {_check.kind(cache)}.")
    for name, scalar in (scalars or {}).items():
        if scalar is not None and not isinstance(scalar, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor or None, got {_check.kind(scalar)}.")
    ways = tuple(lists.values())[:2]
    try:
        plain = _registry.direct([tensors[0] for tensors in ways if tensors]) and _registry._C.all_plain(
            Tensor.is_neg, _CLASSES, ways
        )
    except TypeError:
        plain = False
    if not plain or not ways[0]:
        _check_rows(op, lists, optional)
    if torch.is_grad_enabled():
        _check_unrecorded(op, lists, read)
    return plain


def _check_sequence(op: str, name: str, tensors: Any) -> None:
    if isinstance(tensors, (str, Tensor)) or not isinstance(tensors, (Sequence, ParameterList)):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {_check.kind(tensors)}.")


def _check_rows(op: str, lists: Mapping[str, Tensors], optional: Sequence[str]) -> None:
    """Tensors, and on one device: of several, the dispatcher would pick one, and meta's does nothing."""
    (first_name, first), *_ = lists.items()
    device: torch.device | None = None
    for name, tensors in lists.items():
        if not first and tensors:
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, but {first_name} has 0.")
        for row, tensor in enumerate(tensors):
            if tensor is None and name in optional:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {name}[{row}] must be a torch.Tensor, got {_check.kind(tensor)}.")
            device = device or tensor.device
            if tensor.device != device:
                raise ValueError(
                    f"{op}: {name}[{row}] is on device '{tensor.device}', but {first_name}[0] is on '{device}'."
                )


def _check_unrecorded(op: str, lists: Mapping[str, Tensors], read: str) -> None:
    """What is written may not be part of a graph, which would not know of it."""
    for name, tensors in lists.items():
        if name != read:
            for row, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    raise ValueError(
                        f"{op}: {name}[{row}] requires grad and would be written, which has no gradient; call it under "
                        "torch.no_grad()."
                    )


def split_rate(op: str, lr: float | Tensor) -> tuple[float, Tensor | None]:
    """(lr, None), or (0, tensor) for one that lives on an accelerator and must not be waited for."""
    if not isinstance(lr, Tensor):
        return float(_check.number(op, "lr", lr)), None
    if lr.numel() != 1:
        raise ValueError(f"{op}: lr has shape {tuple(lr.shape)}; it must be a number or one element.")
    return (0.0, lr) if not lr.is_cpu or not _registry.direct([lr]) else (float(lr), None)


def table(op: str, cache: TableCache | None, streams: Sequence[Stream]) -> Table:
    return build(op, streams) if cache is None else cache.get(op, streams)


def scalar(op: str, name: str, value: Tensor, table: Table, dtypes: Sequence[torch.dtype]) -> int:
    """The address of a scalar that the kernel reads."""
    if value.dtype not in dtypes or value.numel() != 1 or value.device != table.device:
        raise ValueError(
            f"{op}: {name} is {value.dtype} with {value.numel()} elements on '{value.device}'; it must be one element "
            f"of {' or '.join(map(str, dtypes))} on '{table.device}'."
        )
    return value.data_ptr()


def control(op: str, table: Table, factor: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None):
    """The addresses of GradControl in csrc/table.h."""
    return [
        0 if factor is None else scalar(op, "grad_factor", factor, table, (torch.float64,)),
        0 if grad_scale is None else scalar(op, "grad_scale", grad_scale, table, (torch.float32,)),
        0 if found_inf is None else scalar(op, "found_inf", found_inf, table, (torch.float32,)),
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
