"""transformers.Trainer with bigmodel.optim.AdamW: clipping, averaging and the update in one pass over memory.

    python examples/train_with_trainer.py [--data FILE] [--steps N] [--out DIR]

A GPT-2 with random weights and a vocabulary of bytes learns the source of the Python standard library (or FILE).
Trainer takes the optimizer as it takes any of torch's, with its own schedule for the learning rate; its clipping is
switched off (`max_grad_norm=0`), since the optimizer clips. Prints the loss on held-out text before and after training,
with the last weights and with their moving average.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import bigmodel
from bigmodel.data.text import load_text, sample_batch

LENGTH = 128


class Windows(Dataset):
    """`count` random windows of a text, each a function of its index alone."""

    def __init__(self, text: bytes, count: int, seed: int) -> None:
        self.text, self.count, self.seed = text, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = sample_batch(self.text, batch=1, length=LENGTH, seed=self.seed, step=index)[0]
        return {"input_ids": window, "labels": window}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a text file; without it, the Python standard library's source")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="trainer-output")
    args = parser.parse_args(arguments)

    text = load_text(args.data)
    held_out = len(text) * 9 // 10
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_embd=128, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None
        )
    )
    optimizer = bigmodel.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, max_grad_norm=1.0, ema_decay=0.98)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            args.out, max_steps=args.steps, per_device_train_batch_size=8, per_device_eval_batch_size=8,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, max_grad_norm=0.0, save_strategy="no",
            report_to="none", logging_steps=max(1, args.steps // 5), dataloader_pin_memory=False,
        ),
        train_dataset=Windows(text[:held_out], args.steps * 8, seed=0),
        eval_dataset=Windows(text[held_out:], 32, seed=1),
        optimizers=(optimizer, None),
    )  # fmt: skip
    losses = {"before": trainer.evaluate()["eval_loss"]}
    trainer.train()
    losses["after"] = trainer.evaluate()["eval_loss"]
    with optimizer.ema_weights():
        losses["average of the weights"] = trainer.evaluate()["eval_loss"]
    print("Held-out loss, nats per byte:", ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    print(f"Norm of the last gradient: {optimizer.grad_norm:.3f}")
    return losses


if __name__ == "__main__":
    main()
