"""What backward is given: hooks on saved tensors that change them, and anybody's call of the registered ops."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import bigmodel.ops

CALLS = {
    "rms_norm": lambda x, w: bigmodel.rms_norm(x, 64, w),
    "layer_norm": lambda x, w: bigmodel.layer_norm(x, 64, w, w),
    "two dimensions": lambda x, w: bigmodel.layer_norm(x, (1, 64), w.view(1, 64)),
    "an offset": lambda x, w: bigmodel.rms_norm(x, 64, w, weight_offset=1.0),
    "memory_efficient": lambda x, w: bigmodel.rms_norm(x, 64, w, memory_efficient=True),
    "a residual": lambda x, w: bigmodel.add_rms_norm(x, x, 64, w)[0],
}


def only(tensor, change, shape):
    return change(tensor) if tensor.shape == shape else tensor


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "change, words",
    [(torch.Tensor.half, "torch.float16"), (lambda t: t[..., :1], "shape"), (lambda t: t.to("meta"), "'meta'")],
    ids=["dtype", "shape", "device"],
)
@pytest.mark.parametrize("shape", [(5, 1, 64), (64,)], ids=["input", "weight"])
@pytest.mark.parametrize("name", CALLS)
def test_hooks_that_change_what_was_saved_are_refused(name, shape, change, words, create_graph):
    if create_graph and name == "memory_efficient":
        pytest.skip("has no second derivatives")
    x, w = torch.randn(5, 1, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    shape = (1, 64) if shape == (64,) and name == "two dimensions" else shape
    with saved_tensors_hooks(lambda t: only(t.detach(), change, shape), lambda t: t):
        out = CALLS[name](x, w)
    with pytest.raises(ValueError, match=f"^(rms|layer)_norm: the .* saved for backward.*{words}.*\\.$"):
        torch.autograd.grad(out.sum(), x, create_graph=create_graph)


@pytest.mark.parametrize("name", CALLS)
def test_statistics_that_hooks_change_are_refused(name):
    x, w = torch.randn(5, 1, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    for change in (torch.Tensor.half, lambda t: t.flatten()[:1]):
        with saved_tensors_hooks(lambda t: t if t.shape[-1] == 64 else change(t), lambda t: t):  # noqa: B023
            out = CALLS[name](x, w)
        with pytest.raises(ValueError, match="the statistics saved for backward"):
            out.sum().backward()


def test_hooks_that_store_another_dtype_and_give_back_the_first():
    x, w = torch.randn(5, 1, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        out = bigmodel.rms_norm(x, 64, w)
    bigmodel.rms_norm(x, 64, w).sum().backward()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, x.grad)


GRAD, ONE, STATISTICS, W = torch.randn(40, 64), torch.ones(1, 1), torch.ones(1, 40), torch.ones(64)
F32 = torch.float32


def backward(grad=GRAD, summed=None, saved=GRAD, statistics=STATISTICS, weight=W, bias=None, dims=1, x_dtype=F32,
             cast=None, wants=(True, False)):  # fmt: skip
    return torch.ops.bigmodel.rms_norm_backward(
        grad, summed, saved, statistics, weight, bias, dims, 0.0, False, x_dtype, cast, *wants
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"saved": ONE}, "saved has shape (1, 1), but grad_out is (40, 64)"),
        ({"saved": GRAD.half()}, "saved has dtype torch.float16; it must be torch.float32"),
        ({"statistics": ONE}, "statistics has shape (1, 1), but one for each row is (1, 40)"),
        ({"statistics": STATISTICS.double()}, "statistics has dtype torch.float64"),
        ({"summed": ONE}, "grad_summed has shape (1, 1)"),
        ({"weight": W[:1]}, "weight has shape (1,)"),
        ({"bias": W[:1]}, "bias has shape (1,)"),
        ({"weight": None}, "weight is None, but wants_weight is True"),
        ({"wants": (True, True)}, "bias is None, but wants_bias is True"),
        ({"dims": 3}, "dims is 3"),
        ({"dims": 0}, "dims is 0"),
        ({"x_dtype": torch.int64}, "x_dtype is torch.int64"),
        ({"cast": torch.int64}, "cast_dtype is torch.int64"),
        ({"grad": GRAD.int()}, "grad_out has dtype torch.int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_registered_backward_checks_what_it_is_given(arguments, words):
    assert backward()[0].shape == GRAD.shape
    with pytest.raises((TypeError, ValueError)) as caught:
        backward(**arguments)
    assert str(caught.value).startswith("rms_norm_backward: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "dims, x_dtype, words",
    [(0, F32, "dims is 0"), (3, F32, "dims is 3"), (1, torch.float64, "x_dtype is torch.float64, but without")],
    ids=str,
)
def test_the_registered_forward_checks_what_it_is_given(dims, x_dtype, words):
    with pytest.raises((TypeError, ValueError), match=f"rms_norm_forward: {words}"):
        torch.ops.bigmodel.rms_norm_forward(GRAD, None, W, None, dims, 1e-5, 0.0, False, F32, x_dtype)
