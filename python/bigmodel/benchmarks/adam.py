"""Cases of the Adam row: whole optimizer steps, in every form that the row has and stock training code writes by hand.

Bytes that must move per parameter, each stream once:

    step        28   param, exp_avg, exp_avg_sq read and written, grad read
    clip + EMA  40   the step, the gradient once more for the norm, the average read and written
    8-bit       16   param read and written, grad read, one byte for each state read and written (scales: 0.06 more)
    masters     26   master, exp_avg, exp_avg_sq read and written, 16-bit grad read, 16-bit param written

In "step" every contender has memory of its own, as a user gets it. Where memory lies moves a step of 50 M by tens of
per cent, so "step in place" has them take turns on the very same parameters, gradients and moments, and there kernels
compare. "touch", a kernel of ours that reads and writes these streams and computes nothing, is the roof of this access
pattern, where "copy" is that of two streams.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bigmodel import _native, optim
from bigmodel.benchmarks import _updates
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal
from bigmodel.benchmarks.harness import COPY, OURS, Case, Contender, Workload
from bigmodel.ops._table import build
from bigmodel.ops.adam import streams

LR, BETAS, EPS, DECAY, EMA_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 1e-2, 0.999, 1.0
STEP, IN_PLACE, CLIP_EMA = "step", "step in place", "clip+ema step"
EIGHT_BIT, MASTERS = "8-bit step", "master step"
BYTES = {STEP: 28, IN_PLACE: 28, CLIP_EMA: 40, EIGHT_BIT: 16, MASTERS: 26}
OPTIONS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
OURS_OPTIONS: dict[str, dict[str, Any]] = {
    STEP: {},
    IN_PLACE: {},
    CLIP_EMA: {"max_grad_norm": MAX_NORM, "ema_decay": EMA_DECAY},
    EIGHT_BIT: {"state_dtype": "8bit"},
    MASTERS: {"master_weights": True},
}
# 1 B parameters, for torch.compile alone, which unrolls a step: its first call took 9 s with 30 tensors, 66 s with 300.
FEW = (30, 33_333_334)
FUSED, FOREACH, TOUCH, BY_HAND = "fused", "foreach", "touch", "copies by hand"


def _contenders(mode: str, device: str, shape: tuple[int, int]) -> tuple[str, ...]:
    if shape == FEW:
        return (OURS, FUSED, "compile")
    peers = _updates.present(*(("bitsandbytes", "deepspeed") if device == "cpu" else ("apex", "transformer_engine")))
    if mode == STEP:
        return (OURS, FUSED, FOREACH, *peers)
    if mode == IN_PLACE:
        return (OURS, FUSED, TOUCH, *(peer for peer in peers if peer == "deepspeed"))
    if mode == EIGHT_BIT:
        return (OURS, *(peer for peer in peers if peer == "bitsandbytes"))
    return (OURS, FUSED if mode == CLIP_EMA else BY_HAND)


# --- contenders -------------------------------------------------------------------------------------------------------


class _Shared:
    """Parameters and moments that the contenders of a case work on in turn."""

    def __init__(self, values: list[Tensor], grads: list[Tensor]):
        self.values, self.grads = values, grads
        self.params: list[Parameter] = []
        self.states: list[dict[str, Tensor]] = []

    def reset(self) -> None:
        """As before the first step. The memory is torch's, as it comes: on huge pages where it has those."""
        if not self.params:
            self.params = _updates.parameters(self.values, self.grads)
            self.states = [{name: torch.empty_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in self.values]
        for param, value, state in zip(self.params, self.values, self.states, strict=True):
            param.detach().copy_(value)
            for moment in state.values():
                moment.zero_()

    def lend_to(self, optimizer: torch.optim.Optimizer, step: Tensor | int) -> None:
        for param, state in zip(self.params, self.states, strict=True):
            optimizer.state[param] = {"step": step.clone() if isinstance(step, Tensor) else step, **state}

    def contender(self, name: str, expected: list[Tensor]) -> Contender:
        self.reset()
        if name == TOUCH:
            return _touch(self, expected)
        optimizer: torch.optim.Optimizer
        if name == "deepspeed":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(self.params, **OPTIONS)
        elif name == FUSED:
            optimizer = torch.optim.AdamW(self.params, **OPTIONS, fused=True)
        else:
            optimizer = optim.AdamW(self.params, **OPTIONS)
        self.lend_to(optimizer, 0 if name == "deepspeed" else torch.zeros(()))
        return _updates.step(optimizer.step, self.params)


def _ours(mode: str, params: list[Parameter], options: dict[str, Any]) -> Contender:
    optimizer = optim.AdamW(params, **options, **OURS_OPTIONS[mode])
    if mode != CLIP_EMA:
        return _updates.step(optimizer.step, params)

    def call():
        optimizer.step()
        return [optimizer.state[p]["ema"] for p in params]

    return Contender(call)


def _peer(name: str, mode: str, params: list[Parameter], options: dict[str, Any]) -> Contender:
    if name == "bitsandbytes":
        from bitsandbytes import optim as peer

        optimizer = (peer.AdamW8bit if mode == EIGHT_BIT else peer.AdamW32bit)(params, **options)
    elif name == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(params, **options)
    elif name == "apex":
        from apex.optimizers import FusedAdam

        optimizer = FusedAdam(params, **options)
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam

        optimizer = FusedAdam(params, **options)
    return _updates.step(optimizer.step, params)


def _stock(name: str, params: list[Parameter], options: dict[str, Any]) -> Contender:
    if name != "compile":
        flags: dict[str, Any] = {name: True}
        return _updates.step(torch.optim.AdamW(params, **options, **flags).step, params)
    torch.compiler.reset()
    optimizer = torch.optim.AdamW(params, **OPTIONS, capturable=True)
    return _updates.step(torch.compile(optimizer.step, fullgraph=False), params)


def _stock_clip_ema(params: list[Parameter]) -> Contender:
    """What stock training code writes; clipping writes into gradients, so these are its own."""
    params = _updates.parameters([p.detach() for p in params], [p.grad.clone() for p in params if p.grad is not None])
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)
    averages = [p.detach().clone() for p in params]

    def call():
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)

    return _updates.step(call, averages)


def _copies_by_hand(params: list[Parameter]) -> Contender:
    """float32 parameters and a gradient buffer that is kept, around torch's fused step."""
    masters = [Parameter(p.detach().float()) for p in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    grads = [p.grad for p in params]
    optimizer = torch.optim.AdamW(masters, **OPTIONS, fused=True)

    def call():
        torch._foreach_copy_([master.grad for master in masters], grads)
        optimizer.step()
        torch._foreach_copy_(params, masters)

    return _updates.step(torch.no_grad()(call), params)


def _touch(shared: _Shared, expected: list[Tensor]) -> Contender:
    """Changes nothing, so what is compared is what was expected."""
    params, steps = [p.detach() for p in shared.params], [torch.zeros(()) for _ in shared.params]
    first, second = ([state[name] for state in shared.states] for name in ("exp_avg", "exp_avg_sq"))
    table = build("touch", streams(params, shared.grads, first, second, steps, (), (), (), (), ()))

    def call():
        _native.load().cpu.adam_touch(table.pointer, table.rows, torch.get_num_threads())

    return _updates.step(call, expected, steps)


def _make(mode: str, values: list[Tensor], grads: list[Tensor], options: dict[str, Any], name: str) -> Contender:
    params = _updates.parameters(values, grads)
    if name == OURS:
        return _ours(mode, params, options)
    if name == BY_HAND:
        return _copies_by_hand(params)
    if mode == CLIP_EMA:
        return _stock_clip_ema(params)
    if name in (FUSED, FOREACH, "compile"):
        return _stock(name, params, options)
    return _peer(name, mode, params, options)


# --- workloads --------------------------------------------------------------------------------------------------------


def _expected(mode: str, values: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """After the first step from zero moments, where corrected moments are the gradient and its square."""
    clip = 1.0
    if mode == CLIP_EMA:
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1).item()
    expected = []
    for value, grad in zip(values, grads, strict=True):
        w, g = value.double(), grad.double() * clip
        after = w * (1 - LR * DECAY) - LR * g / (g.abs() + EPS)
        expected.append(w + (1 - EMA_DECAY) * (after - w) if mode == CLIP_EMA else after)
    return expected


def _build(
    mode: str, dtype: torch.dtype, shape: tuple[int, int], options: dict[str, Any], device: torch.device
) -> Workload:
    values, grads = _updates.normal(shape, dtype, device), _updates.normal(shape, dtype, device, seed=1)
    expected = _expected(mode, values, grads)
    if mode == IN_PLACE:
        return Workload(partial(_Shared(values, grads).contender, expected=expected), expected)
    return Workload(partial(_make, mode, values, grads, options), expected)


def _case(device: str, mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    launch_bound = shape == _updates.MANY
    options = OPTIONS | ({"capturable": True} if launch_bound and device == "cuda" else {})  # as a graph needs it
    return Case(
        op="adamw",
        mode=mode,
        dtype=dtype,
        shape=shape,
        bytes=BYTES[mode] * shape[0] * shape[1],
        contenders=_contenders(mode, device, shape),
        build=partial(_build, mode, dtype, shape, options),
        launch_bound=launch_bound,
    )


# --- the group: what `bigmodel bench adam` measures and is held to ----------------------------------------------------


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device, "cpu" or "cuda"; `quick` takes the plain step, `sweep` adds nothing."""
    large = _updates.large(device)
    chosen = [(STEP, torch.float32, large), (STEP, torch.float32, _updates.MANY)]
    if not quick:
        chosen += [(STEP, torch.float32, FEW)] if device == "cuda" else []
        chosen += [(IN_PLACE, torch.float32, large)] if device == "cpu" else []
        chosen += [
            (CLIP_EMA, torch.float32, large),
            (EIGHT_BIT, torch.float32, large),
            (MASTERS, torch.bfloat16, large),
        ]
        chosen += [(MASTERS, torch.float16, large)] if device == "cuda" else []
    return [_case(device, *which) for which in chosen]


def goals(device: str) -> list[Goal]:
    """What the row promises on a kind of device, against the peers that can be imported."""
    large, float32 = _updates.large(device), torch.float32
    if device == "cuda":
        wanted = [(STEP, float32, large, COPY, 0.9)]
        wanted += [(STEP, float32, large, other, 1) for other in (FUSED, "apex")]
        wanted += [(STEP, float32, FEW, "compile", 1)]
    else:
        wanted = [
            (STEP, float32, large, FUSED, 1.05),
            (STEP, float32, large, "deepspeed", 1.1),
            (IN_PLACE, float32, large, FUSED, 1),
            (IN_PLACE, float32, large, "deepspeed", 1.1),
            (IN_PLACE, float32, large, TOUCH, 0.9),
            (CLIP_EMA, float32, large, FUSED, 1.5),
            (STEP, float32, _updates.MANY, FUSED, 4),
            (STEP, float32, _updates.MANY, "deepspeed", 1),
            (EIGHT_BIT, float32, large, "bitsandbytes", 5),
            (MASTERS, torch.bfloat16, large, BY_HAND, 1.4),
        ]
    result = []
    for pages in (DEFAULT_PAGES, HUGE_PAGES) if device == "cpu" else (DEFAULT_PAGES,):
        for mode, dtype, shape, against, limit in wanted:
            case = _case(device, mode, dtype, shape)
            if against in (*case.contenders, COPY):
                result.append(Goal(f"{case.name} against {against}, {pages}", pages, case.name, against, limit))
    return result
