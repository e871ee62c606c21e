"""The training loop, and what it is measured with."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from bigmodel.train.loop import train_steps, warmup_cosine
from bigmodel.train.profile import PeakMemory, module_share, saved_for_backward
from bigmodel.train.remote import Remote


class Bigrams(torch.nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Embedding(8, 8)

    def forward(self, input_ids, labels, use_cache):
        logits = self.logits(input_ids[:, :-1]).flatten(0, 1)
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


def counting(step):
    return (torch.arange(12).view(2, 6) + step) % 8


# --- loop -------------------------------------------------------------------------------------------------------------


def test_each_record_is_one_step_and_the_loss_falls():
    torch.manual_seed(0)
    model = Bigrams()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    records = list(train_steps(model, map(counting, range(20)), optimizer))
    assert [record.step for record in records] == list(range(20))
    assert all(record.tokens == 12 and record.seconds > 0 for record in records)
    assert records[-1].loss < 0.2 < 1.5 < records[0].loss


def test_a_step_equals_one_written_out():
    def trained(steps):
        torch.manual_seed(0)
        model = Bigrams()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        steps(model, optimizer)
        return model.logits.weight

    def written_out(model, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            model(counting(step), counting(step), False).loss.backward()
            norm = model.logits.weight.grad.norm()
            assert norm > 0.01
            model.logits.weight.grad.mul_(0.01 / (norm + 1e-6))
            optimizer.param_groups[0]["lr"] = 0.5**step
            optimizer.step()

    def looped(model, optimizer):
        halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in train_steps(model, map(counting, range(3)), optimizer, scheduler=halving, max_grad_norm=0.01):
            pass

    torch.testing.assert_close(trained(looped), trained(written_out))


def test_a_loss_that_is_not_finite_stops_the_training():
    model = Bigrams()
    torch.nn.init.constant_(model.logits.weight, torch.nan)
    with pytest.raises(ValueError, match="train_steps: the loss is nan at step 0"):
        next(train_steps(model, [counting(0)], torch.optim.SGD(model.parameters(), lr=1.0)))


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    optimizer = torch.optim.SGD(Bigrams().parameters(), lr=2.0)
    scheduler = warmup_cosine(optimizer, 14, warmup=4, floor=0.1)
    rates = []
    for _ in range(17):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[9] == pytest.approx(1.1)
    assert rates[14:] == pytest.approx([0.2, 0.2, 0.2])


# --- profile ----------------------------------------------------------------------------------------------------------


class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.05)
        return grad * 2


class Napping(torch.nn.Module):
    def forward(self, x):
        return Nap.apply(x)


def test_the_time_in_modules_is_forward_and_backward():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Napping(), Napping())
    x = torch.ones(1, 4)
    alone = module_share(model, ["1"], lambda: model(x).sum().backward())
    both = module_share(model, ["1", "2"], lambda: model(x).sum().backward())
    assert 0.07 <= alone.module_seconds <= alone.step_seconds - 0.07
    assert 0.14 <= both.module_seconds <= both.step_seconds
    assert both.share == both.module_seconds / both.step_seconds


def test_the_hooks_are_gone_again_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    x = torch.ones(1, 4, requires_grad=True)
    module_share(model, ["0"], lambda: model(x).sum().backward())
    with pytest.raises(ZeroDivisionError):
        module_share(model, ["0"], lambda: 1 / 0)
    layer = model[0]
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    assert not any(hooks)


def test_a_name_that_is_no_module_is_named():
    with pytest.raises(ValueError, match="module_share: names has 'norm', which is no module of Bigrams"):
        module_share(Bigrams(), ["logits", "norm"], lambda: None)


def test_bytes_saved_for_backward_are_exact():
    model = torch.nn.Linear(100, 50)
    x = torch.ones(10, 100, requires_grad=True)

    def step():
        hidden = model(x).exp()
        (hidden * hidden).sum().backward()

    # x for the weight's gradient, and exp's result, kept twice in one storage; not the weight, kept for x's gradient.
    assert saved_for_backward(model, step) == 4 * (10 * 100 + 10 * 50)


class Hoard:
    """The kernel counts pages in batches, so its mark may be a few of them short."""

    def __init__(self):
        self._memory = PeakMemory(torch.device("cpu"))

    def peak(self, megabytes):
        torch.ones(megabytes, 2**20, dtype=torch.uint8)
        return self._memory.bytes() / 2**20


def test_the_peak_outlives_the_memory():
    with Remote("hoard", Hoard) as hoard:
        assert hoard.call("peak", 1) < 40
        assert 99 <= hoard.call("peak", 100) < 140
        assert 99 <= hoard.call("peak", 1) < 140


# --- remote -----------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self, start):
        self.count = start + 0

    def add(self, number):
        self.count += number
        return self.count, os.getpid()

    def die(self):
        os._exit(3)


def test_an_object_keeps_its_state_in_a_process_of_its_own():
    with Remote("one", Counter, 10) as one, Remote("two", Counter, 20) as two:
        assert one.call("add", 1)[0] == 11
        assert two.call("add", 1)[0] == 21
        first, second = one.call("add", 1), two.call("add", 1)
        assert (first[0], second[0]) == (12, 22)
        assert len({first[1], second[1], os.getpid()}) == 3


def test_errors_come_back_with_the_name_of_the_remote():
    with pytest.raises(RuntimeError, match="^broken: TypeError: "):
        Remote("broken", Counter, None)
    with Remote("fragile", Counter, 0) as fragile, pytest.raises(RuntimeError, match="^fragile: TypeError: "):
        fragile.call("add", "one")


def test_a_process_that_dies_is_reported():
    with Remote("mortal", Counter, 0) as mortal, pytest.raises(RuntimeError, match="mortal: .* exit code 3"):
        mortal.call("die")
