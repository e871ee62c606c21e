"""What backward is given: hooks on saved tensors that change them, and anybody's call of the registered ops."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import bigmodel.ops

X = torch.randn(2, 3, 4, 32)
attention = bigmodel.ops.attention_softmax
CALLS = {
    "softmax": bigmodel.softmax,
    "columns": lambda x: bigmodel.log_softmax(x, 0),
    "attention": attention,
    "softcap": lambda x: attention(x, softcap=2.0),
    "dropout": lambda x: attention(x, dropout_p=0.5),
    "sinks": lambda x: attention(x, sinks=torch.ones(3, requires_grad=True)),
}
CHANGES = {"dtype": torch.Tensor.half, "shape": lambda t: t.flatten()[:1], "device": lambda t: t.to("meta")}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_hooks_that_change_what_was_saved_are_refused(name, change, create_graph):
    with saved_tensors_hooks(lambda t: CHANGES[change](t.detach()), lambda t: t):
        x = X.clone().requires_grad_()
        out = CALLS[name](x)
    with pytest.raises(ValueError, match="^(attention_)?softmax: the .* saved for backward.* came back from a hook"):
        torch.autograd.grad(out.sum(), x, create_graph=create_graph)


@pytest.mark.parametrize("name, which", [("softcap", 1), ("sinks", 1), ("dropout", 1)])
def test_each_saved_tensor_is_looked_at(name, which):
    seen = []

    def cut(tensor):
        seen.append(tensor)
        return tensor.detach().expand(3, *tensor.shape) if len(seen) == which + 1 else tensor.detach()

    x = X.clone().requires_grad_()
    with saved_tensors_hooks(cut, lambda t: t):
        out = CALLS[name](x)
    with pytest.raises(ValueError, match="attention_softmax: the (scores|probabilities of the sinks|seed) saved"):
        out.sum().backward()


G = torch.randn(2, 3, 4, 8)
SEED = torch.tensor(1)


def attention_backward(grad=G, saved=G, scores=None, sink_probs=None, seed=None, softcap=None, dropout_p=0.0,
                       mask_shape=None, wants_sinks=False):  # fmt: skip
    return torch.ops.bigmodel.attention_softmax_backward(
        grad, saved, scores, sink_probs, seed, 1.0, None, None, softcap, dropout_p, torch.float32, mask_shape,
        wants_sinks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"saved": G[:1, :1, :1, :1]}, "saved has shape (1, 1, 1, 1), but grad_out is (2, 3, 4, 8)"),
        ({"saved": G.half()}, "saved has dtype torch.float16"),
        ({"softcap": 2.0}, "scores is None"),
        ({"softcap": 2.0, "scores": G[0]}, "scores has shape (3, 4, 8)"),
        ({"wants_sinks": True}, "sink_probs is None"),
        ({"wants_sinks": True, "sink_probs": G}, "sink_probs has shape (2, 3, 4, 8)"),
        ({"dropout_p": 0.5}, "seed must be there"),
        ({"dropout_p": 0.5, "seed": SEED.int()}, "seed is torch.int32"),
        ({"mask_shape": [5, 8]}, "mask_shape is (5, 8), which does not broadcast"),
        ({"grad": G[0, 0, 0], "saved": G[0, 0, 0]}, "grad_out has shape (8,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_registered_backward_checks_what_it_is_given(arguments, words):
    assert attention_backward()[0].shape == G.shape
    with pytest.raises((TypeError, ValueError)) as caught:
        attention_backward(**arguments)
    assert str(caught.value).startswith("attention_softmax_backward: ") and words in str(caught.value)


def test_the_registered_ops_of_plain_softmax_check_too():
    ops, f32 = torch.ops.bigmodel, torch.float32
    with pytest.raises(ValueError, match=r"softmax_backward: out has shape \(1, 1\), but grad_out is \(4, 8\)"):
        ops.softmax_backward(G[0, 0], G[0, 0, :1, :1], False, f32)
    with pytest.raises(TypeError, match="softmax_backward: out has dtype torch.float16; it must be torch.float32"):
        ops.softmax_backward(G, G.half(), False, f32)
    with pytest.raises(ValueError, match="softmax_backward: grad_out has no dimension"):
        ops.softmax_backward(G.sum(), G.sum(), False, f32)
    with pytest.raises(TypeError, match="softmax_forward: out_dtype is torch.int32"):
        ops.softmax_forward(G, False, torch.int32)
    with pytest.raises(ValueError, match="softmax_forward: input has no dimension"):
        ops.softmax_forward(G.sum(), False, f32)


def test_the_registered_forward_needs_a_seed_for_dropout():
    with pytest.raises(ValueError, match="attention_softmax_forward: seed must be there with dropout_p > 0"):
        torch.ops.bigmodel.attention_softmax_forward(
            G, None, None, None, None, 1.0, None, None, None, 0.5, torch.float32
        )
