"""Exponential moving averages over lists of tensors, in one native call. Formula: csrc/ops/ema.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import _multi_tensor
from bigmodel.ops._table import Stream, TableCache

_OP = "ema_"


def _body(averages, values, decay, cache=None):
    if not averages:
        return
    streams = (Stream("averages", averages), Stream("values", values, restride=True))
    table = _multi_tensor.table(_OP, cache, streams)
    _registry.native(averages[0]).ema(table.pointer, table.rows, decay, *_registry.place(averages[0]))
    _multi_tensor.wrote(averages)


_EMA = _registry.register(
    _OP, "(Tensor(a!)[] averages, Tensor[] values, float decay) -> ()", _body, lambda *arguments: None
)


def ema_(
    averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, *, cache: TableCache | None = None
) -> None:
    """averages[i] += (1 - decay) * (values[i] - averages[i]), for all i, in place.

    Args:
        averages, values: of one device; float32, bfloat16, float16 or float64, rows may differ in dtype. Arithmetic is
            float32, float64 where either is.
        decay: how much of the average is kept; 0 copies the values.
        cache: keeps the table of addresses between calls with the same tensors.

    Raises:
        TypeError, ValueError: one sentence naming the argument and the row; averages that require grad, in grad mode.
            Values may: they are read as constants.
    """
    direct = _multi_tensor.direct(_OP, cache, {"averages": averages, "values": values}, "values")
    _check.number(_OP, "decay", decay)
    if direct:
        _body(averages, values, float(decay), cache)
    else:
        _registry.dispatch(_EMA, averages, values, float(decay))
