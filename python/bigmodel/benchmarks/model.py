"""A training step of a Llama of transformers from a config, stock and converted: tokens/s, memory, losses.

`stock` is the model as it comes with torch's fused AdamW; `converted` the same weights on the same tokens after
bigmodel.convert, with bigmodel's AdamW. Attention stays: for Llama it is scaled_dot_product_attention in both. The two
take turns, so that what the machine does meanwhile falls on both; a step lies between two reads of its loss.

    python -m bigmodel.benchmarks.model --device cuda --journal FILE
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import bigmodel
from bigmodel.benchmarks.harness import in_a_line
from bigmodel.benchmarks.journal import Journal, Progress

VARIANTS = ("stock", "converted")
TURNS = 2
WARM_UP, STEPS = 3, 10
LEARNING_RATE = 1e-4

# By kind of device: a Llama of 1.2 B parameters in bfloat16, and one that a CPU steps in a moment.
_SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "cpu": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
_TOKENS = {"cuda": (4, 2048), "cpu": (2, 64)}  # sequences, length


def measure_turns(device: str, journal: Journal, seconds: float | None = None) -> None:
    """Runs each variant TURNS times into a journal; begins none after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    items = [f"{variant} {turn}" for turn in range(1, TURNS + 1) for variant in VARIANTS]
    for item in journal.plan(items):
        if end is not None and time.monotonic() > end:
            break
        journal.begin(item)
        try:
            found = measure(item.split()[0], device)
        except Exception as error:  # the other variant's figures stay of use
            traceback.print_exc()
            journal.error(item, in_a_line(error))
        else:
            journal.end(item, **found)


def measure(variant: str, device: str) -> dict[str, Any]:
    """One turn: builds the model, warms up, times STEPS steps.

    Returns:
        parameters; tokens of a step; seconds and losses, one for each timed step; memory_bytes, the most that tensors
        held from the first step on (None on a CPU); replaced, what `convert` exchanged.
    """
    model, optimizer, replaced = _build(variant, device)
    batch, length = _TOKENS[device]
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if device == "cuda":
            torch.cuda.synchronize()  # the loss does not wait for the optimizer
        seconds.append(time.perf_counter() - start)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens.numel(),
        "seconds": seconds[WARM_UP:],
        "losses": losses[WARM_UP:],
        "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "replaced": replaced,
    }
    del model, optimizer, tokens, loss
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def _build(variant: str, device: str) -> tuple[Any, torch.optim.Optimizer, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPES[device]))
    model.to(dtype).train()
    if variant == "stock":
        return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True), 0
    report = bigmodel.convert(model)
    return model, bigmodel.optim.AdamW(model.parameters(), lr=LEARNING_RATE), len(report.replaced)


def summary(progress: Progress) -> dict[str, dict[str, Any]]:
    """By variant that has a turn: tokens_per_second (of the median step), seconds (median, least, greatest), memory."""
    result = {}
    for variant in VARIANTS:
        turns = [found for item, found in progress.done.items() if item.split()[0] == variant]
        if not turns:
            continue
        seconds = [value for turn in turns for value in turn["seconds"]]
        result[variant] = {
            "parameters": turns[0]["parameters"],
            "tokens_per_second": turns[0]["tokens"] / statistics.median(seconds),
            "seconds": [statistics.median(seconds), min(seconds), max(seconds)],
            "memory_bytes": turns[0]["memory_bytes"],
            "losses": [turns[0]["losses"][0], turns[0]["losses"][-1]],
            "replaced": turns[0]["replaced"],
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bigmodel.benchmarks.model", description=__doc__)
    parser.add_argument("--device", required=True, choices=list(_SHAPES))
    parser.add_argument("--journal", required=True, type=Path)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    measure_turns(arguments.device, Journal(arguments.journal), arguments.seconds)
