"""Cases of the gradient norm: 4 bytes per float32 element for the norm, 12 with the scaling of a clip that acts."""

from __future__ import annotations

from functools import partial

import torch

from bigmodel import optim
from bigmodel.benchmarks import _updates
from bigmodel.benchmarks.goals import Goal
from bigmodel.benchmarks.harness import OURS, Case, Workload

NORM, CLIP = "norm", "clip"
BYTES = {NORM: 4, CLIP: 12}


def _build(mode, shape, device):
    grads = _updates.normal(shape, torch.float32, device)
    values = [torch.zeros_like(grad) for grad in grads]
    norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()

    def make(name):
        params = _updates.parameters(values, [grad.clone() for grad in grads])
        clip = optim.clip_grad_norm_ if name == OURS else partial(torch.nn.utils.clip_grad_norm_, foreach=True)
        bound = [norm.item() if mode == CLIP else float("inf")]  # lowered by each clip, so that each one acts

        def call():
            if mode == CLIP:
                bound[0] *= 0.999
            result.copy_(clip(params, bound[0]))

        result = torch.zeros((), device=device)
        return _updates.step(call, [result])

    return Workload(make, [norm])


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda"; `quick` takes many small tensors, `sweep` adds nothing."""
    return [
        Case(
            op="clip_grad_norm", mode=mode, dtype=torch.float32, shape=shape, bytes=BYTES[mode] * shape[0] * shape[1],
            contenders=(OURS, "foreach"), build=partial(_build, mode, shape), launch_bound=False,
        )
        for shape in _updates.shapes(device, quick)
        for mode in (NORM, CLIP)
    ]  # fmt: skip


def goals(device: str) -> list[Goal]:
    """What the row promises: ahead of torch's foreach."""
    return _updates.ahead_of("foreach", cases(device))
