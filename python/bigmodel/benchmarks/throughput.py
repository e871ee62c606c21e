"""`bigmodel bench --throughput`: training steps of a small language model, as points that a planner's Job reads.

What is measured is a decoder of 4 layers of 256 with bigmodel's norms, AdamW and float32 (bfloat16 autocast on CUDA).
For a model of your own, time its step likewise and write the same lines: pool, devices, rate, source.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import bigmodel

_LAYERS, _WIDTH, _HEADS, _VOCABULARY, _LENGTH = 4, 256, 4, 1024, 256


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = bigmodel.nn.RMSNorm(_WIDTH), bigmodel.nn.RMSNorm(_WIDTH)
        self.qkv, self.out = torch.nn.Linear(_WIDTH, 3 * _WIDTH), torch.nn.Linear(_WIDTH, _WIDTH)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(_WIDTH, 4 * _WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def measure(device: str | None = None, *, quick: bool = False) -> list[dict[str, Any]]:
    """Tokens per second on one device of this machine: a list with one point as `Rate` has it.

    pool is "cpu", or the GPU's name in lower case with dashes. Only one device is used, so devices is 1 (for "cpu" it
    stands for the whole processor); several devices are to be measured under the launcher that will run the job.

    Raises:
        ValueError: a device other than "cpu" and "cuda", or "cuda" where torch sees none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {device!r}, accepted are 'cpu' and 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device is 'cuda', but torch sees no CUDA device.")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(_VOCABULARY, _WIDTH),
        *(_Block() for _ in range(_LAYERS)),
        torch.nn.Linear(_WIDTH, _VOCABULARY),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(_VOCABULARY, (8 if device == "cpu" else 64, _LENGTH + 1), device=device)
    seconds = [_step(model, optimizer, batch) for _ in range(3 if quick else 12)][1 if quick else 2 :]
    rate = batch[:, 1:].numel() / statistics.median(seconds)
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    return [{"pool": name, "devices": 1, "rate": round(rate, 1), "source": "measured"}]


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Seconds of one step; reading the loss waits for the device."""
    start = time.perf_counter()
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - start


def to_toml(points: list[dict[str, Any]]) -> str:
    """The points as lines of a job in a problem file."""
    lines = [
        f'  {{ pool = "{p["pool"]}", devices = {p["devices"]}, rate = {p["rate"]}, source = "{p["source"]}" }},'
        for p in points
    ]
    return "\n".join(['unit = "tokens"', "throughput = [", *lines, "]"]) + "\n"
