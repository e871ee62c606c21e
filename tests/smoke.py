"""Every op once, against float64, and the planner: what a wheel must do where only it and its dependencies are.

Run with the environment's own interpreter, by tests/test_wheel.py, `make wheel` and cibuildwheel.
"""

from __future__ import annotations

import sys

import torch

import bigmodel
from bigmodel import ops, schedule
from bigmodel._native import load

SHAPE = (8, 64)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-5)


def norm(name: str, centred: bool, added: bool) -> None:
    x, y, w = draw(1).requires_grad_(), draw(2), draw(3)[0].requires_grad_()
    summed = x.double() + (y.double() if added else 0)
    mean = summed.mean(-1, keepdim=True) if centred else 0
    exact = (summed - mean) / ((summed - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    given = ((x, y) if added else (x,)) + ((SHAPE[1:], w, None) if centred else (SHAPE[1:], w))
    out = getattr(ops, name)(*given, eps=1e-5)
    out = out[0] if added else out
    close(out, exact)
    ours = torch.autograd.grad(out.square().sum(), (x, w))
    for gradient, wanted in zip(ours, torch.autograd.grad(exact.square().sum(), (x, w)), strict=True):
        close(gradient / 100, wanted / 100)


def softmax(name: str) -> None:
    x = draw(1).requires_grad_()
    own = {"attention_softmax": "softmax"}.get(name, name)
    exact = getattr(torch, own)(x.double(), -1)
    out = getattr(ops, name)(x.view(1, 1, *SHAPE)).view(SHAPE) if own != name else getattr(ops, name)(x, -1)
    close(out, exact)
    weight = draw(2)
    (ours,), (wanted,) = (torch.autograd.grad((y * weight).sum(), x) for y in (out, exact))
    close(ours, wanted)


def adam() -> None:
    p, g, m, v, step = draw(1), draw(2), torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(())
    exact = torch.nn.Parameter(p.double())
    exact.grad = g.double()
    torch.optim.AdamW([exact], lr=0.1, eps=1e-8, weight_decay=0.1).step()
    ops.adam_([p], [g], [m], [v], [step], lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decoupled=True)
    close(p, exact)


def sgd() -> None:
    p, g = draw(1), draw(2)
    exact = p.double() - 0.1 * (g.double() + 0.1 * p.double())
    ops.sgd_([p], [g], lr=0.1, weight_decay=0.1)
    close(p, exact)


def adagrad() -> None:
    p, g, total, step = draw(1), draw(2), torch.zeros(SHAPE), torch.zeros(())
    exact = p.double() - 0.1 * g.double() / (g.double().abs() + 1e-10)
    ops.adagrad_([p], [g], [total], [step], lr=0.1)
    close(p, exact)


def ema() -> None:
    average, value = draw(1), draw(2)
    exact = 0.9 * average.double() + 0.1 * value.double()
    ops.ema_([average], [value], 0.9)
    close(average, exact)


def grad_norm() -> None:
    g = draw(1)
    exact = g.double() * (0.5 / (g.double().norm() + 1e-6))
    ops.grad_scale_([g], ops.grad_clip(ops.grad_total([g]), 0.5).factor)
    close(g, exact)


def plan() -> None:
    pool = schedule.Pool(name="a", count=8, price=2.0)
    rate = schedule.Rate(pool="a", devices=8, rate=1.0)
    job = schedule.Job(name="train", work=7200.0, throughput=(rate,))
    problem = schedule.Problem(slots=4, pools=(pool,), jobs=(job,))
    assert schedule.solve(problem, time_limit=60).table()


NORMS = {
    "layer_norm": (True, False),
    "rms_norm": (False, False),
    "add_layer_norm": (True, True),
    "add_rms_norm": (False, True),
}
SOFTMAXES = ("softmax", "log_softmax", "attention_softmax")
UPDATES = {"adam_": adam, "sgd_": sgd, "adagrad_": adagrad, "ema_": ema}
GRAD_NORM = ("grad_total", "grad_clip", "grad_scale_")


def main() -> None:
    assert bigmodel.__file__.startswith(sys.prefix), f"{bigmodel.__file__} is not the wheel of {sys.prefix}"
    tried = {*NORMS, *SOFTMAXES, *UPDATES, *GRAD_NORM}
    assert tried == set(ops.__all__) - {"TableCache"}, "an op is missing in this file"
    for name, (centred, added) in NORMS.items():
        norm(name, centred, added)
    for name in SOFTMAXES:
        softmax(name)
    for update in UPDATES.values():
        update()
    grad_norm()
    plan()
    print(f"every op and the planner right; {load().cuda_status}")


if __name__ == "__main__":
    main()
