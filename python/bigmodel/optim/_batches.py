"""Which tensors a step updates in which call, and what of the last step still holds.

Looking 500 small tensors and their states up in Python takes far longer than updating them. So what a step has found is
kept, and the next one has native code see that it is so still: the same parameters with the same states, in them the
same tensors, of the same kinds. Only gradients may be others, and addresses, which are read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel.ops._table import Refreshed, TableCache
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
_layout, _dtype, _device_index = attrgetter("layout"), attrgetter("dtype"), Tensor.get_device


class Batch(NamedTuple):
    """Parameters of one group with gradients, on one device and spread in one way: one call of the op.

    Attributes:
        key: tells the batches of an optimizer apart.
        owners: the parameters, as they are in the group.
        params, grads: their local parts.
        states: of the parameters, in their order.
        cache: for the op, where all but the gradients is as in the last step; else None.
    """

    key: tuple[int, torch.device, Spread | None]
    group: dict[str, Any]
    owners: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: list[dict[str, Any]]
    cache: Refreshed | None = None

    @property
    def whole(self) -> bool:
        """Whether the batch is all of its group, and no DTensors."""
        return self.params is self.group["params"]


class Rows:
    """What is kept between steps for a batch.

    Attributes:
        cache: of its table.
        columns: the tensors of its states, by the op's argument; `names` are their keys in a state.
        batch: the last one, without its gradients.
        settings, sizes: of the group and the parameters, and of the states, when nothing was missing in these.
        versions: of the parameters after the last step, where they have masters.
    """

    __slots__ = ("batch", "cache", "columns", "names", "settings", "sizes", "versions")

    def __init__(self) -> None:
        self.cache = TableCache()
        self.columns: dict[str, Any] = {}
        self.names: tuple[str, ...] = ()
        self.batch: Batch | None = None
        self.settings: Any = None
        self.sizes: list[int] = []
        self.versions: list[int] | None = None

    def complete(self, settings: Any, batch: Batch) -> bool:
        """Whether these are the states, settings and kinds of parameters of the last step."""
        return (
            self.batch is not None
            and self.settings == (settings, *kinds(batch.params))
            and list(map(id, self.batch.states)) == list(map(id, batch.states))
            and self.sizes == list(map(len, batch.states))
        )

    def completed(self, settings: Any, batch: Batch) -> None:
        """Nothing is missing in the states of a batch any more."""
        self.settings, self.versions = (settings, *kinds(batch.params)), None
        self.sizes = list(map(len, batch.states))

    def read(self, batch: Batch, names: dict[str, str]) -> None:
        """Takes the tensors of a batch's states."""
        self.columns = {
            argument: [None if (t := state.get(name)) is None else local(t) for state in batch.states]
            for argument, name in names.items()
        }
        owners = list(batch.owners)
        params = owners if batch.params is batch.owners else batch.params
        self.names, self.batch = tuple(names.values()), batch._replace(owners=owners, params=params, grads=())

    def as_before(self, group: dict[str, Any], settings: Any) -> Batch | None:
        """The last batch with new gradients, or None where anything else has changed."""
        last = self.batch
        if last is None or self.settings[0] != settings:
            return None
        columns = tuple(self.columns.values())
        grads = _C.gradients_as_before(
            list(group["params"]), _CLASSES, last.owners, last.states, self.sizes, self.names, columns
        )
        if grads is None:
            return None
        table = self.cache.refreshed({"params": last.owners, "grads": grads, **self.columns})
        return None if table is None else last._replace(group=group, grads=grads, cache=Refreshed(table))


def kinds(params: Sequence[Tensor]) -> tuple[list, list]:
    """What the formats of states depend on beside settings."""
    return list(map(Tensor.stride, params)), list(map(_dtype, params))


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
