"""What the optimizer tests share: small problems, and steps that two optimizers take side by side."""

from __future__ import annotations

import copy
import functools
import io

import torch
from torch import nn

SHAPES = ((7,), (33, 5), (), (0, 3), (2, 3, 4, 4))
LARGE = ((64, 80), (5000,), (16, 16, 5, 5), (130,))  # three get 8-bit moments, and no size is a multiple of 256


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    """Random parameters; those of four dimensions are channels_last."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    values = [v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    return [nn.Parameter(value) for value in values]


def clones(params, dtype=None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in params]


@functools.lru_cache(maxsize=5000)
def noise(step: int, row: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + row), dtype=torch.float64)


def gradient(params, step: int, pull: float = 1.0, scale: float = 1.0, dtype=None) -> None:
    """Of a quadratic bowl around a point that jumps about: the same for the same step and weights."""
    for row, p in enumerate(params):
        if not p.requires_grad:
            continue
        grad = noise(step, row, p.shape).to(p.device)
        if pull:
            grad = grad + pull * p.detach()
        if dtype is not None:
            p.grad_dtype = dtype
        # in the parameter's order of memory, as autograd's gradients are
        p.grad = torch.empty_like(p, dtype=dtype or p.dtype).copy_(grad if scale == 1.0 else scale * grad)


def steps(optimizer, count: int, first: int = 0, **options) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + count):
        gradient(params, step, **options)
        optimizer.step()


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(a, b) -> bool:
    """Whether two optimizers hold the same bits for their parameters, in the same keys."""
    one, other = copy.deepcopy(a.state_dict()["state"]), b.state_dict()["state"]
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys()
        and all(v.dtype is other[key][n].dtype and torch.equal(v, other[key][n]) for n, v in one[key].items())
        for key in one
    )


def same_values(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
