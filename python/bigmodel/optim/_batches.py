"""Which tensors a step updates in which call, and what of the last step still holds.

Looking 500 small tensors and their states up in Python takes far longer than updating them. So what a step has found is
kept, and the next one has native code see that it is so still: the same parameters with the same states, and tensors of
the same kinds. Gradients and the tensors in the states may be others, and addresses, which are read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel.ops._table import Refreshed, TableCache, describe
from bigmodel.optim._distributed import (
    PLAIN,
    Spread,
    all_plain,
    device_of,
    local,
    local_gradient,
    spread_of,
)

_C = _registry._C
_CLASSES = tuple(PLAIN)
_layout, _device_index = attrgetter("layout"), Tensor.get_device


class Batch(NamedTuple):
    """Parameters of one group with gradients, on one device and spread in one way: one call of the op.

    Attributes:
        key: tells the batches of an optimizer apart.
        owners: the parameters, as they are in the group.
        params, grads: their local parts.
        states: of the parameters, in their order.
        columns: the tensors of the states, by the op's argument. Every step looks them up and nothing keeps them, so
            that replacing them, as offloading does, gives their memory back.
        cache: of the op's table; None before `columns` are there.
    """

    key: tuple[int, torch.device, Spread | None]
    group: dict[str, Any]
    owners: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: list[dict[str, Any]]
    columns: dict[str, Any] = {}  # noqa: RUF012, never written to
    cache: TableCache | None = None

    @property
    def whole(self) -> bool:
        """Whether the batch is all of its group, and no DTensors."""
        return self.params is self.group["params"]


class Rows:
    """What is kept between steps for a batch.

    Attributes:
        cache: of its table.
        names: the keys of the columns in a state, by the op's argument.
        batch: the last one, without gradients and columns.
        settings, described: of the group, and of the parameters and columns, when nothing was missing in the states.
        versions: of the parameters after the last step, where they have masters.
    """

    __slots__ = ("batch", "cache", "described", "names", "settings", "versions")

    def __init__(self) -> None:
        self.cache = TableCache()
        self.names: dict[str, str] = {}
        self.batch: Batch | None = None
        self.settings: Any = None
        self.described: Any = None
        self.versions: list[int] | None = None

    def complete(self, settings: Any, batch: Batch, described: Any) -> bool:
        """Whether parameters, states and settings are those of the last step, and of the same kinds."""
        return (
            self.batch is not None
            and self.settings == settings
            and _same(self.batch.owners, batch.owners)
            and _same(self.batch.states, batch.states)
            and self.described is not None
            and self.described == described
        )

    def keep(self, settings: Any, batch: Batch, names: dict[str, str], described: Any) -> None:
        """Nothing is missing in the states of this batch."""
        owners = list(batch.owners)
        params = owners if batch.params is batch.owners else batch.params
        self.batch = batch._replace(owners=owners, params=params, grads=(), columns={})
        self.settings, self.names, self.described = settings, names, described

    def as_before(self, group: dict[str, Any], settings: Any) -> Batch | None:
        """The last batch with new gradients, or None where anything else is another object or of another kind."""
        last = self.batch
        if last is None or self.settings != settings:
            return None
        names = tuple(self.names.values())
        found = _C.gradients_and_states(list(group["params"]), _CLASSES, last.owners, last.states, names)
        if found is None:
            return None
        grads, columns = found[0], dict(zip(self.names, found[1], strict=True))
        table = self.cache.refreshed({"params": last.owners, "grads": grads, **columns})
        if table is None:
            return None
        return last._replace(group=group, grads=grads, columns=columns, cache=Refreshed(table))


def described(batch: Batch) -> Any:
    """What the formats of states depend on beside settings, and the formats that they have."""
    return describe((batch.params, *batch.columns.values()))


def _same(one: Sequence, other: Sequence) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def columns_of(states: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """What the states have under each name, or None, by the op's argument."""
    return {
        argument: [None if (t := state.get(name)) is None else local(t) for state in states]
        for argument, name in names.items()
    }


def one_device(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors, the parameters on one device."""
    return all_plain(params) and all_plain(grads) and len(set(map(_device_index, params))) == 1


def strided(grads: Sequence[Tensor]) -> bool:
    return set(map(_layout, grads)) == {torch.strided}


def split(index: int, group: dict, params: Sequence, grads: Sequence, states: list) -> list[Batch]:
    """Batches of parameters on different devices, or spread over processes."""
    columns: dict[Any, tuple[list, list, list, list]] = {}
    for param, grad, state in zip(params, grads, states, strict=True):
        key = (index, device_of(param), spread_of(param))
        row = (param, local(param), local_gradient(param, grad), state)
        for column, value in zip(columns.setdefault(key, ([], [], [], [])), row, strict=True):
            column.append(value)
    return [Batch(key, group, *lists) for key, lists in columns.items()]
