"""The shapes that a contender takes in every group: forward, forward and backward, backward, a raw kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel.benchmarks.harness import Contender


def forward(function: Callable, args: Sequence) -> Contender:
    return Contender(partial(function, *args))


def forward_backward(
    function: Callable, args: Sequence, leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> Contender:
    """One call, then its backward from `grads`, one for each output."""

    def call():
        outputs = function(*args)
        if len(grads) == 1:
            outputs.backward(grads[0])
        else:
            torch.autograd.backward(outputs, grads)
        return outputs

    return Contender(call, leaves)


def backward(function: Callable, args: Sequence, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Contender:
    """The backward alone; its forward is untimed."""
    outputs: list[Tensor] = []

    def prepare():
        outputs[:] = as_list(function(*args))

    def call():
        torch.autograd.backward(outputs, grads)
        return ()

    return Contender(call, leaves, prepare)


def kernel(launch: Callable, place: Tensor, outputs: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> Contender:
    """A native function whose outputs are allocated already.

    Args:
        launch: takes the last two arguments of a native call: where it runs.
        place: a tensor of the device that it runs on.
        outputs: what it writes and is compared by.
        buffers: whatever else it has the address of.
    """

    def call():
        # Read anew each time: while a CUDA graph is captured, another stream is the current one.
        launch(*_registry.place(place))
        return outputs

    return Contender(call, buffers=buffers)


def compiled(function: Callable) -> Callable:
    """torch.compile for one shape at a time, so that no case pays for the guards of those before it."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
