"""Forward and backward of every op, and optimizers' steps, captured in a CUDA graph: replays see what is new."""

from __future__ import annotations

import pytest
import torch

import bigmodel

pytestmark = pytest.mark.cuda


def captured(call):
    """(graph, results) of `call`, after a first run on another stream, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


CALLS = {
    "rms_norm": lambda x, w: bigmodel.rms_norm(x, x.shape[-1], w),
    "layer_norm": lambda x, w: bigmodel.layer_norm(x, x.shape[-1], w, w),
    "add_rms_norm": lambda x, w: bigmodel.add_rms_norm(x, x, x.shape[-1], w)[0],
    "softmax": lambda x, w: bigmodel.softmax(x + w),
    "attention_softmax": lambda x, w: bigmodel.attention_softmax(x, mask=w, causal=True),
}


@pytest.mark.parametrize("cols", [96, 1000, 32768])  # part of a warp, a block, a cluster or the longest softmax
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name, dtype, cols):
    x, w = (torch.randn(n, cols, device="cuda", dtype=dtype) for n in (70, 1))
    x, w = x.requires_grad_(), w[0].clone().requires_grad_()
    grad = torch.randn_like(x)

    def call():
        out = CALLS[name](x, w)
        return out, *torch.autograd.grad(out, (x, w), grad)

    graph, results = captured(call)
    with torch.no_grad():
        for t in (x, w, grad):
            t.copy_(torch.randn_like(t))
    graph.replay()
    for ours, eager in zip(results, call(), strict=True):
        assert torch.equal(ours, eager)


def test_dropout_is_drawn_anew_and_backward_drops_the_same():
    x = torch.zeros(4, 64, 128, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)

    def call():
        out = bigmodel.attention_softmax(x, dropout_p=0.5)
        return out, *torch.autograd.grad(out, x, grad)

    graph, (out, x_grad) = captured(call)
    seen = []
    for _ in range(2):
        graph.replay()
        kept, y = (out != 0).float(), 1 / 128
        g = grad * kept * 2
        torch.testing.assert_close(x_grad, y * (g - (g * y).sum(-1, keepdim=True)))
        seen.append(kept)
    assert not torch.equal(*seen) and abs(float(seen[0].mean()) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("name", "options"), [("AdamW", {"capturable": True}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})]
)
def test_found_inf_skips_a_replayed_step(name, options):
    param = torch.randn(1000, device="cuda", requires_grad=True)
    param.grad = torch.randn_like(param)
    optimizer = getattr(bigmodel.optim, name)(
        [param], lr=torch.tensor(0.1, device="cuda"), max_grad_norm=1.0, **options
    )
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.ones((), device="cuda")
    graph, _ = captured(optimizer.step)
    moved = []
    for found_inf in (0.0, 1.0, 0.0):
        optimizer.found_inf.fill_(found_inf)
        before = param.detach().clone()
        graph.replay()
        moved.append(not torch.equal(param.detach(), before))
    assert moved == [True, False, True] and optimizer.skipped_steps == 1
