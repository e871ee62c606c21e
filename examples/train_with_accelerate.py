"""accelerate with bigmodel.optim.AdamW: a bfloat16 model with float32 master weights and 8-bit states.

    python examples/train_with_accelerate.py [--data FILE] [--steps N] [--out DIR]

A Llama with random weights and a vocabulary of bytes learns the source of the Python standard library (or FILE). Half
way the whole state is saved and loaded again into new objects, as after an interruption. Prints the loss and the bytes
that the optimizer keeps for each parameter, beside those of torch.optim.AdamW with a float32 model.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import bigmodel
from bigmodel.data.text import load_text, sample_batch

LENGTH, BATCH = 128, 8


def build(accelerator: Accelerator, steps: int):
    """(model, optimizer, schedule), prepared."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
        )
    ).bfloat16()  # fmt: skip
    optimizer = bigmodel.optim.AdamW(
        model.parameters(), lr=2e-3, weight_decay=0.1, max_grad_norm=1.0, master_weights=True, state_dtype="8bit"
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return accelerator.prepare(model, optimizer, schedule)


def train(accelerator, model, optimizer, schedule, text: bytes, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = sample_batch(text, batch=BATCH, length=LENGTH, seed=accelerator.process_index, step=step)
        batch = batch.to(accelerator.device)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a text file; without it, the Python standard library's source")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="accelerate-output")
    args = parser.parse_args(arguments)

    text, half = load_text(args.data), args.steps // 2
    accelerator = Accelerator()
    trained = build(accelerator, args.steps)
    losses = train(accelerator, *trained, text, range(half))
    accelerator.save_state(args.out)

    accelerator.free_memory(*trained)
    trained = build(accelerator, args.steps)
    accelerator.load_state(args.out)
    losses += train(accelerator, *trained, text, range(half, args.steps))

    model, optimizer, _ = trained
    states = [value for state in optimizer.state.values() for value in state.values()]
    parameters = sum(p.numel() for p in model.parameters())
    kept = sum(value.nbytes for value in states) / parameters
    accelerator.print(f"Loss, nats per byte: {losses[0]:.3f} at first, {sum(losses[-10:]) / 10:.3f} at last")
    accelerator.print(f"Bytes kept for a parameter beside it: {kept:.2f}; by torch.optim.AdamW in float32: 8.00")
    return losses


if __name__ == "__main__":
    main()
