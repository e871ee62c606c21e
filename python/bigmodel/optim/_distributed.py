"""Tensors that are spread over processes: their local parts, and sums over all parts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = {Tensor, Parameter}


class Spread(NamedTuple):
    """Over which dimensions of which DeviceMesh a tensor's elements are spread; it is repeated over the others."""

    mesh: Any
    dimensions: tuple[int, ...]

    @property
    def part(self) -> int:
        """Which part this process holds: the same number wherever the same elements are."""
        coordinate = self.mesh.get_coordinate()
        part = 0
        for dimension in self.dimensions:
            part = part * self.mesh.size(dimension) + coordinate[dimension]
        return part

    def reduce_(self, total: Tensor, largest: bool) -> None:
        """Adds a scalar up over the parts, in place, or takes its maximum."""
        import torch.distributed as dist

        for dimension in self.dimensions:
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(total, operation, group=self.mesh.get_group(dimension))


def is_dtensor(tensor: Any) -> bool:
    if type(tensor) in PLAIN or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def all_plain(tensors: Iterable[Tensor]) -> bool:
    return set(map(type, tensors)) <= PLAIN


def spread_of(tensor: Tensor) -> Spread | None:
    """None for a tensor that this process holds whole."""
    if not is_dtensor(tensor):
        return None
    dimensions = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]  # type: ignore[attr-defined]
    return Spread(tensor.device_mesh, tuple(dimensions))  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; of a plain tensor, itself."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor._local_tensor  # type: ignore[attr-defined]
    return part if type(part) in PLAIN else part.wait()  # an AsyncCollectiveTensor


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient's part for the parameter's: summed up or moved first, where it is placed in another way."""
    if is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """`part` as the local part of something placed as `tensor` is."""
    if not is_dtensor(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()  # type: ignore[attr-defined]
    )  # fmt: skip


def whole(scalar: Tensor) -> Tensor:
    """A scalar that may be a DTensor, as a plain tensor."""
    return scalar.full_tensor() if is_dtensor(scalar) else scalar  # type: ignore[attr-defined]


def device_of(tensor: Tensor) -> torch.device:
    return local(tensor).device
