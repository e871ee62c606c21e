"""Tables of tensors for the multi-tensor ops, as csrc/table.h describes them.

A call reads the address, dtype, device, size and strides of every tensor anew, since anything may have moved them
(load_state_dict, `.to()`, `p.data =`, FSDP, a new gradient at a freed address). Addresses go into the table as they
are; where anything else differs, all tensors are checked again and the table is built anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _native
from bigmodel._native import DTYPE_CODES

QUANT_BLOCK = 256
_QUANTISED = 4
_FORMATS = {**DTYPE_CODES, torch.uint8: _QUANTISED}
_C = _native.load()
_DLPACK = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10

Tensors = Sequence[Tensor | None]


class Stream(NamedTuple):
    """One column of addresses.

    Attributes:
        name: the argument that it comes from.
        tensors: one for each row, or none at all; None in a row that has no such stream.
        dtypes: what is accepted.
        elements: "all", as many as the first stream, in the same order; "one"; or "scales", one for each QUANT_BLOCK.
        restride: a tensor in another order than the first stream's, or in the first stream one with overlapping or
            scattered elements, is copied, instead of refused (it is only read).
        optional: whether the list may be empty and its entries None.
    """

    name: str
    tensors: Tensors
    dtypes: Sequence[torch.dtype] = tuple(DTYPE_CODES)
    elements: str = "all"
    restride: bool = False
    optional: bool = False


class Table:
    """What C++ reads: integers, column after column. It keeps no tensor alive but gradients that had to be copied."""

    __slots__ = ("_copies", "_values", "device", "pointer", "rows", "scratch")

    def __init__(self, values: array, rows: int, device: torch.device, copies: list[Tensor]):
        self._values, self.rows, self.device, self._copies = values, rows, device, copies
        self.pointer = values.buffer_info()[0]
        self.scratch: Tensor | None = None


class TableCache:
    """What a multi-tensor op (`adam_`, `sgd_`, ...) may keep between calls: its table of addresses.

    Make one for each list of tensors that is updated again and again, say for each parameter group, and pass it as
    `cache` in every call; most of a call over many small tensors is saved. It keeps no tensor alive, and nothing goes
    wrong where tensors, their addresses or the op change: then the table is checked and built anew.

        cache = bigmodel.ops.TableCache()
        for grads in ...:
            bigmodel.ops.sgd_(params, grads, lr=0.1, cache=cache)
    """

    __slots__ = ("_described", "_key", "_table")

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()  # the op, and the names of its streams
        self._described: Any = None
        self._table: Table | None = None

    def get(self, op: str, streams: Sequence[Stream]) -> Table:
        lists = {stream.name: stream.tensors for stream in streams}
        key = (op, *lists)
        table = self.refreshed(lists) if self._key == key else None
        if table is None:
            self._described = self._table = None
            table = build(op, streams)
            if not table._copies:  # a copy of a gradient holds the values of this call only
                self._key = key
                self._described, self._table = describe(tuple(lists.values())), table
        return table

    def refreshed(self, lists: dict[str, Tensors]) -> Table | None:
        """The table with the addresses that the tensors have now; None if it has to be built.

        Args:
            lists: of the op that the table is of, the tensors of each stream by its name; one that is not there is
                empty.
        """
        table, self._table = self._table, None
        if table is None or self._described is None:
            return None
        if not _read_addresses(tuple([lists.get(name, ()) for name in self._key[1:]]), self._described, table):
            return None
        self._table = table
        return table


class Refreshed(TableCache):
    """A table that has been read anew for the one call that it is given to."""

    __slots__ = ()

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table

    def get(self, op: str, streams: Sequence[Stream]) -> Table:
        assert self._table is not None
        return self._table


def describe(lists: tuple[Tensors, ...]) -> Any:
    """All that `build` looks at but the addresses, to be compared; None where tensors cannot be described."""
    try:
        if _DLPACK is not None:
            return _C.describe_tensors(_DLPACK, lists)
        return [[None if t is None else _attributes(t) for t in tensors] for tensors in lists]
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return None


def _attributes(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.get_device(), tensor.size(), tensor.stride(), tensor.data_ptr() == 0


def _read_addresses(lists: tuple[Tensors, ...], described: Any, table: Table) -> bool:
    """Whether the tensors are as described; then the table has their addresses."""
    try:
        if _DLPACK is not None:
            return _C.read_addresses(_DLPACK, lists, described, table.pointer, table.rows)
        if describe(lists) != described:
            return False
        for place, tensors in enumerate(lists):
            if tensors:
                start = (2 + place) * table.rows
                addresses = [0 if t is None else t.data_ptr() for t in tensors]
                table._values[start : start + table.rows] = array("q", addresses)
        return True
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return False


def build(op: str, streams: Sequence[Stream]) -> Table:
    """Checks every tensor and lays the table out; TypeError or ValueError naming the op, the argument and the row."""
    first: Sequence[Any] = streams[0].tensors
    for stream in streams:
        if len(stream.tensors) != len(first) and not (stream.optional and not stream.tensors):
            raise ValueError(
                f"{op}: {stream.name} has {len(stream.tensors)} tensors, but {streams[0].name} has {len(first)}."
            )
    device = first[0].device if first else torch.device("cpu")
    sizes = [t.numel() for t in first]
    formats = [0] * len(first)
    columns: list[list[int]] = []
    copies: list[Tensor] = []
    for place, stream in enumerate(streams):
        column = [0] * len(first)
        for row, tensor in enumerate(stream.tensors):
            if tensor is None and stream.optional:
                continue
            tensor = _accepted(op, stream, row, tensor, first[row], streams[0].name, device, copies)
            column[row] = tensor.data_ptr()
            if not column[row] and tensor.numel():
                kind = type(tensor).__name__
                raise TypeError(f"{op}: {stream.name}[{row}] must be a plain tensor, got a {kind} without memory.")
            if stream.elements != "scales":
                formats[row] |= _FORMATS[tensor.dtype] << 8 * place
        columns.append(column)
    for stream in streams:
        if torch.uint8 in stream.dtypes:
            _check_scales(op, stream, next(s for s in streams if s.name == stream.name[:-1] + "_scales"))
    values = array("q", sizes + formats)
    for column in columns:
        values.extend(column)
    return Table(values, len(first), device, copies)


def _check_scales(op: str, codes: Stream, scales: Stream) -> None:
    for row, tensor in enumerate(codes.tensors):
        if tensor is not None and tensor.dtype is torch.uint8 and (not scales.tensors or scales.tensors[row] is None):
            raise ValueError(f"{op}: {codes.name}[{row}] has 8-bit codes, but {scales.name} has no scales for them.")


def _accepted(
    op: str, stream: Stream, row: int, tensor: Any, like: Tensor, like_name: str, device: torch.device,
    copies: list[Tensor],
) -> Tensor:  # fmt: skip
    """The tensor, or its copy in the first stream's order."""
    what = f"{op}: {stream.name}[{row}]"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{what} must be a dense torch.strided tensor, got a nested one or {tensor.layout}.")
    if tensor.dtype not in stream.dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in stream.dtypes)
        raise TypeError(f"{what} has dtype {tensor.dtype}; supported are {accepted}.")
    if tensor.device != device:
        raise ValueError(f"{what} is on device '{tensor.device}', but {like_name}[0] is on '{device}'.")
    if stream.elements != "all":
        wanted = 1 if stream.elements == "one" else -(-like.numel() // QUANT_BLOCK)
        if tensor.numel() != wanted or not tensor.is_contiguous():
            raise ValueError(f"{what} has {tensor.numel()} elements; it must be contiguous and have {wanted}.")
        return tensor
    if tensor.dtype is torch.uint8:
        if like.dtype is torch.float64:
            raise TypeError(f"{what} has 8-bit codes, but {like_name}[{row}] is float64, which they cannot serve.")
        if tensor.ndim == 1 and tensor.numel() == like.numel() and tensor.is_contiguous():
            return tensor  # flat, in the parameter's order of memory
    if tensor.shape != like.shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, but {like_name}[{row}] is {tuple(like.shape)}.")
    if tensor is like:
        if not dense(tensor):
            if not stream.restride:
                raise ValueError(f"{what} has overlapping or scattered elements (strides {tensor.stride()}).")
            tensor = tensor.contiguous()
            copies.append(tensor)
    elif not same_order(tensor, like):
        if not stream.restride:
            raise ValueError(
                f"{what} has strides {tensor.stride()}, but {like_name}[{row}] has {like.stride()}; they must be equal."
            )
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        copies.append(tensor)
    return tensor


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order of memory."""
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    return all(x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)
