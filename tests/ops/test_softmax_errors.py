"""Bad input to the softmax ops: one sentence that names the op and the argument, and nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bigmodel

X = torch.randn(2, 3, 4, 5)
LEAF = X.clone().requires_grad_()
attention = bigmodel.attention_softmax

CASES = {
    "scores are no tensor": (lambda: attention([1.0]), TypeError, "scores must be a torch.Tensor, got list"),
    "integer scores": (lambda: attention(X.int()), TypeError, "scores has dtype torch.int32"),
    "one dimension": (
        lambda: attention(X[0, 0, 0]),
        ValueError,
        "scores has shape (5,); accepted is (..., heads",
    ),
    "sparse scores": (lambda: attention(X.to_sparse()), TypeError, "scores must be a dense torch.strided tensor"),
    "scale": (lambda: attention(X, scale=float("nan")), ValueError, "scale is nan; it must be finite"),
    "scale is text": (lambda: attention(X, scale="1"), TypeError, "scale must be a number, got str"),
    "mask is a list": (lambda: attention(X, mask=[True]), TypeError, "mask must be a torch.Tensor, got list"),
    "integer mask": (lambda: attention(X, mask=X.long()), TypeError, "mask has dtype torch.int64; accepted are bool"),
    "mask shape": (
        lambda: attention(X, mask=X[..., :4]),
        ValueError,
        "mask has shape (2, 3, 4, 4), which does not broadcast to the scores' (2, 3, 4, 5)",
    ),
    "mask of more dimensions": (
        lambda: attention(X, mask=X[None]),
        ValueError,
        "mask has shape (1, 2, 3, 4, 5), ",
    ),
    "mask device": (
        lambda: attention(X, mask=X.to("meta")),
        ValueError,
        "mask is on device 'meta', but the scores are on",
    ),
    "float64 mask beside float32 scores": (
        lambda: attention(X, mask=X.double()),
        TypeError,
        "mask is float64, but the scores are torch.float32; pass it in float32",
    ),
    "float64 slopes beside float32 scores": (
        lambda: attention(X, alibi_slopes=torch.ones(3).double()),
        TypeError,
        "alibi_slopes is float64, but the scores are torch.float32",
    ),
    "float64 sinks beside bfloat16 scores": (
        lambda: attention(X.bfloat16(), sinks=torch.ones(3).double()),
        TypeError,
        "sinks is float64, but the scores are torch.bfloat16; pass it in torch.bfloat16 or float32",
    ),
    "complex scores": (lambda: attention(X.cfloat()), TypeError, "scores has dtype torch.complex64"),
    "complex mask": (lambda: attention(X, mask=X.cfloat()), TypeError, "mask has dtype torch.complex64; accepted are"),
    "window of three": (lambda: attention(X, window=(1, 2, 3)), TypeError, "window must be a pair (left, right)"),
    "FlashAttention's open window": (
        lambda: attention(X, window=(128, -1)),
        ValueError,
        "window is (128, -1); neither side may be negative, and FlashAttention's -1 for no limit is None here",
    ),
    "causal": (lambda: attention(X, causal=1), TypeError, "causal must be a bool, got int"),
    "numpy's bool": (
        lambda: attention(X, causal=np.True_),
        TypeError,
        f"causal must be a bool, got numpy.{type(np.True_).__name__}",
    ),
    "window of one": (lambda: attention(X, window=3), TypeError, "window must be a pair (left, right), got 3"),
    "window of floats": (
        lambda: attention(X, window=(1.0, 2)),
        TypeError,
        "window is (1.0, 2); accepted are",
    ),
    "negative window": (
        lambda: attention(X, window=(-1, 0)),
        ValueError,
        "window is (-1, 0); neither side may be negative, and FlashAttention's -1 for no limit is None here",
    ),
    "softcap": (lambda: attention(X, softcap=0.0), ValueError, "softcap is 0.0; it must be greater than 0"),
    "negative softcap": (lambda: attention(X, softcap=-1), ValueError, "softcap is -1; it must be greater than 0"),
    "infinite softcap": (lambda: attention(X, softcap=float("inf")), ValueError, "softcap is inf; it must be finite"),
    "slopes of another length": (
        lambda: attention(X, alibi_slopes=torch.ones(2)),
        ValueError,
        "alibi_slopes has shape (2,), but one for each head is (3,)",
    ),
    "slopes that require grad": (
        lambda: attention(X, alibi_slopes=torch.ones(3, requires_grad=True)),
        ValueError,
        "alibi_slopes requires grad, but there is no gradient to it",
    ),
    "sinks of another length": (
        lambda: attention(X, sinks=torch.ones(5)),
        ValueError,
        "sinks has shape (5,), but one for each head is (3,)",
    ),
    "integer sinks": (lambda: attention(X, sinks=torch.ones(3).int()), TypeError, "sinks has dtype torch.int32"),
    "sinks without heads": (
        lambda: attention(X[0, 0], sinks=torch.ones(1)),
        ValueError,
        "sinks needs scores (..., ",
    ),
    "dropout of 1": (
        lambda: attention(X, dropout_p=1.0),
        ValueError,
        "dropout_p is 1.0; it must be at least 0",
    ),
    "negative dropout": (lambda: attention(X, dropout_p=-0.1), ValueError, "dropout_p is -0.1; it must be at least 0"),
    "dropout is text": (lambda: attention(X, dropout_p="0"), TypeError, "dropout_p must be a number, got str"),
    "out_dtype": (lambda: attention(X, out_dtype=torch.int8), TypeError, "out_dtype is torch.int8"),
    "inplace is no bool": (lambda: attention(X, inplace=1), TypeError, "inplace must be a bool, got int"),
    "inplace on a leaf": (
        lambda: attention(X.clone().requires_grad_(), inplace=True),
        ValueError,
        "scores is a leaf that requires grad, which inplace=True would overwrite",
    ),
    "inplace on a part of a leaf": (
        lambda: attention(LEAF[0], inplace=True),
        ValueError,
        "scores is a view of a leaf that requires grad, which inplace=True would overwrite",
    ),
    "inplace of another dtype": (
        lambda: attention(X, inplace=True, out_dtype=torch.float64),
        ValueError,
        "out_dtype is torch.float64, but inplace=True writes into scores of torch.float32",
    ),
    "inplace on an expanded tensor": (
        lambda: attention(X[:1].expand(2, 3, 4, 5), inplace=True),
        ValueError,
        "scores is expanded, so inplace=True would write one element several times",
    ),
    "inplace on overlapping elements": (
        lambda: attention(X.as_strided((4, 4), (1, 1)), inplace=True),
        ValueError,
        "scores has overlapping elements (strides (1, 1)), so inplace=True would write one element several times",
    ),
    "softmax of a list": (
        lambda: bigmodel.softmax([1.0]),
        TypeError,
        "softmax: input must be a torch.Tensor",
    ),
    "softmax of integers": (lambda: bigmodel.softmax(X.int()), TypeError, "softmax: input has dtype torch.int32"),
    "softmax of a sparse tensor": (
        lambda: bigmodel.softmax(X.to_sparse()),
        TypeError,
        "softmax: input must be a dense torch.strided tensor",
    ),
    "softmax of a nested tensor": (
        lambda: bigmodel.softmax(torch.nested.nested_tensor([X[0, 0], X[0, 1]])),
        TypeError,
        "softmax: input must be a dense torch.strided tensor",
    ),
    "softmax dim": (
        lambda: bigmodel.log_softmax(X, 4),
        ValueError,
        "log_softmax: dim is 4; input of shape (2, 3, 4, 5) has dims -4 to 3",
    ),
    "softmax dim is text": (lambda: bigmodel.softmax(X, "1"), TypeError, "softmax: dim must be an int, got str"),
    "torch.nn.functional's third argument": (
        lambda: bigmodel.softmax(X, -1, 3),
        TypeError,
        "softmax: dtype must be a torch.dtype, got 3; supported are",
    ),
    "softmax dtype": (lambda: bigmodel.softmax(X, -1, torch.int32), TypeError, "softmax: dtype is torch.int32"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_names_the_op_and_the_argument(case):
    call, error, words = CASES[case]
    before = X.clone()
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert words in message and message.split(":")[0] in ("attention_softmax", "softmax", "log_softmax")
    assert message.endswith(".") and "\n" not in message
    assert torch.equal(X, before) and torch.equal(LEAF, before)


def test_the_registered_op_checks_what_it_is_given():
    with pytest.raises(ValueError, match="attention_softmax_forward: mask has shape"):
        torch.ops.bigmodel.attention_softmax_forward(
            X, X[..., :2], None, None, None, 1.0, None, None, None, 0.0, torch.float32
        )


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"softcap": 2.0, "inplace": True}], ids=str)
def test_second_derivatives_that_do_not_exist_are_refused(options):
    x = X.clone().requires_grad_()
    out = attention(x * 1, **options)
    with pytest.raises(RuntimeError, match="^attention_softmax: there are no second derivatives with"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


VIEWS = [lambda x: x[..., :3], lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1]]


@pytest.mark.parametrize("view", VIEWS)
def test_inplace_on_what_is_scattered_but_not_overlapping(view):
    scores = view(X.clone())
    expected = attention(scores.clone())
    assert attention(scores, inplace=True) is scores and torch.equal(scores, expected)
