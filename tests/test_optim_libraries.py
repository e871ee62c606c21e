"""bigmodel.optim under transformers.Trainer and accelerate: the two examples, in small."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
TEXT = b"def add(a, b):\n    return a + b\n\n\n" * 200


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    return str(tmp_path / "text")


def test_trainer_takes_it_as_any_torch_optimizer(text, tmp_path):
    import train_with_trainer

    losses = train_with_trainer.main(["--data", text, "--steps", "12", "--out", str(tmp_path)])
    assert losses["after"] < losses["before"] - 0.5
    assert losses["average of the weights"] not in (losses["before"], losses["after"])


def test_accelerate_takes_it_and_its_checkpoint_goes_on(text, tmp_path):
    import train_with_accelerate
    from accelerate import Accelerator

    interrupted = train_with_accelerate.main(["--data", text, "--steps", "12", "--out", str(tmp_path)])
    assert interrupted[-1] < interrupted[0] - 0.5
    accelerator = Accelerator()
    trained = train_with_accelerate.build(accelerator, 12)
    assert train_with_accelerate.train(accelerator, *trained, TEXT, range(12)) == interrupted
    states = trained[1].state
    assert {s["exp_avg"].dtype for s in states.values()} == {torch.uint8, torch.float32}
    assert all(s["master"].dtype is torch.float32 for s in states.values())
