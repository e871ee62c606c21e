"""A plain training loop that times itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: its number from 0, mean loss in nats per token, wall time, and tokens trained on."""

    step: int
    loss: float
    seconds: float
    tokens: int


def train_steps(
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float = 1.0,
) -> Iterator[StepRecord]:
    """Trains a causal language model, one step per record taken from the iterator.

    The time of a step runs from the batch on its device to the loss on the host, which waits for every kernel of
    the step, so it is right on asynchronous devices too.

    Args:
        model: called as ``model(input_ids=batch, labels=batch, use_cache=False)``, its result carrying ``loss``,
            as the causal language models of transformers do.
        batches: (batch, length) int64 token ids on the model's device.
        optimizer: over the model's parameters.
        scheduler: stepped after each optimizer step.
        max_grad_norm: the gradient's L2 norm is clipped to this.

    Yields:
        A StepRecord after each step.

    Raises:
        ValueError: the loss is not finite.
    """
    model.train()
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        seconds = time.perf_counter() - start
        if not math.isfinite(value):
            raise ValueError(f"train_steps: the loss is {value} at step {step}; lower the learning rate.")
        if scheduler is not None:
            scheduler.step()
        yield StepRecord(step, value, seconds, batch.numel())


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, *, warmup: int, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises linearly over ``warmup`` steps, then falls along a cosine to ``floor`` times its peak.

    Source: Loshchilov, Hutter, "SGDR" (arXiv 1608.03983), one cycle with warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
