"""What the benchmarks of the optimizer rows share: parameters with gradients, and one step as a contender."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from bigmodel.benchmarks.goals import DEFAULT_PAGES, Goal
from bigmodel.benchmarks.harness import OURS, Case, Contender, Workload

LARGE, MANY = (1, 50_000_000), (500, 64)  # tensors, elements of each
LARGE_CUDA = (300, 3_333_334)  # 1 B parameters in 300 tensors


def large(device: str) -> tuple[int, int]:
    return LARGE if device == "cpu" else LARGE_CUDA


def shapes(device: str, quick: bool) -> list[tuple[int, int]]:
    """A few large tensors, and many small ones; these alone for a quick run."""
    return [MANY] if quick else [large(device), MANY]


def normal(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """As many tensors as shape[0] says, of shape[1] elements each, the same in every call."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape[1], generator=generator, dtype=dtype, device=device) for _ in range(shape[0])]


def parameters(values: Iterable[Tensor], grads: Iterable[Tensor]) -> list[Parameter]:
    """Parameters of their own, with gradients that may be shared (a step only reads them)."""
    params = [Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def step(call: Callable[[], object], outputs: Sequence[Tensor], keep: Sequence[Tensor | None] = ()) -> Contender:
    """`call` as it is timed; its result is what it leaves in `outputs`. `keep`: what it has addresses of."""

    def run():
        call()
        return outputs

    return Contender(run, buffers=keep)


def present(*modules: str) -> list[str]:
    """The peers that can be imported here."""
    return [name for name in modules if importlib.util.find_spec(name)]


def ahead_of(other: str, cases: Iterable[Case]) -> list[Goal]:
    return [Goal(f"{case.name} ahead of {other}", DEFAULT_PAGES, case.name, other, 1) for case in cases]


def case(
    op: str, bytes_each: int, stock: Sequence[str], optimizer: Callable, expected: Callable, shape: tuple[int, int]
) -> Case:
    """One float32 step of an optimizer.

    Args:
        optimizer: (contender, parameters) -> the optimizer.
        expected: (value, gradient) -> what the first step makes of the value, in float64.
    """

    def build(device: torch.device) -> Workload:
        values, grads = normal(shape, torch.float32, device), normal(shape, torch.float32, device, seed=1)

        def make(name: str) -> Contender:
            params = parameters(values, grads)
            return step(optimizer(name, params).step, params)

        return Workload(make, list(map(expected, values, grads)))

    return Case(
        op, "step", torch.float32, shape, bytes_each * shape[0] * shape[1], (OURS, *stock), build, shape == MANY
    )
