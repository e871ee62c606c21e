"""bigmodel.nn and what mirrors it refuse in the constructor what the first call would, in one sentence."""

from __future__ import annotations

import pytest
import torch

from bigmodel.compat import apex
from bigmodel.compat.apex.contrib.layer_norm import FastLayerNorm
from bigmodel.nn import AttentionSoftmax, LayerNorm, MultiheadAttention, RMSNorm, SinusoidalPositionalEncoding

NORMS = [LayerNorm, RMSNorm]


def message(call, *kinds):
    with pytest.raises(kinds or (TypeError, ValueError)) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"memory_efficient": "yes"}, "memory_efficient must be a bool, got str"),
        ({"weight_offset": float("inf")}, "weight_offset is inf; it must be finite"),
        ({"weight_offset": 1.0, "elementwise_affine": False}, "weight_offset is 1.0, but there is no weight"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32; supported are"),
        ({"out_dtype": "x"}, "out_dtype must be a torch.dtype, got 'x'"),
        ({"eps": "x"}, "eps must be a number, got str"),
        ({"eps": -1.0}, "eps is -1.0; it must be finite and at least 0"),
        ({"normalized_shape": "x"}, "normalized_shape must be an int or a sequence of ints, got 'x'"),
        ({"normalized_shape": (8.0,)}, "normalized_shape must be an int or a sequence of ints, got (8.0,)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", NORMS)
def test_norms(cls, options, words):
    assert message(lambda: cls(**{"normalized_shape": 8, **options})).startswith(f"{cls.__name__}: {words}")


def test_layer_norm_has_no_eps_that_it_chooses():
    assert message(lambda: LayerNorm(8, eps=None), TypeError) == "LayerNorm: eps must be a number, got NoneType."
    assert RMSNorm(8).eps is None


@pytest.mark.parametrize("cls", NORMS)
@pytest.mark.parametrize("shape", [8, [8], torch.Size((8,)), range(8, 9), (2, 4)], ids=str)
def test_norms_take_the_shapes_that_torchs_take(cls, shape):
    stock = getattr(torch.nn, cls.__name__)(shape)
    assert cls(shape).normalized_shape == stock.normalized_shape and repr(cls(shape)) == repr(stock)


@pytest.mark.parametrize("cls", NORMS)
def test_norms_keep_their_options(cls):
    module = cls(8, weight_offset=1.0, memory_efficient=True, out_dtype=torch.float64)
    assert "weight_offset=1.0, memory_efficient=True, out_dtype=torch.float64" in repr(module)
    torch.nn.init.ones_(module.weight)
    module.reset_parameters()
    assert (module.weight == 0).all() and module(torch.randn(2, 8)).dtype is torch.float64


APEX = [*(getattr(apex.normalization, name) for name in apex.normalization.__all__), FastLayerNorm]


@pytest.mark.parametrize("cls", APEX, ids=lambda cls: cls.__name__)
def test_norms_of_apex(cls):
    name = cls.__name__
    assert message(lambda: cls("x")) == f"{name}: normalized_shape must be an int or a sequence of ints, got 'x'."
    assert message(lambda: cls(8, memory_efficient="x")) == f"{name}: memory_efficient must be a bool, got str."
    assert message(lambda: cls(8, "x")) == f"{name}: eps must be a number, got str."


def test_bias_correction_is_a_bool():
    text = message(lambda: apex.optimizers.FusedAdam([torch.nn.Parameter(torch.ones(2))], bias_correction="x"))
    assert text == "apex.optimizers.FusedAdam: bias_correction must be a bool, got str."


@pytest.mark.parametrize("name", ["alibi", "sinks", "causal", "inplace"])
def test_flags_of_attention_softmax(name):
    assert message(lambda: AttentionSoftmax(4, **{name: "x"})) == f"AttentionSoftmax: {name} must be a bool, got str."


def test_heads_of_attention_softmax():
    for heads in ("x", 0, 2.0, True):
        assert "num_heads is" in message(lambda: AttentionSoftmax(heads, sinks=True), ValueError)  # noqa: B023


@pytest.mark.parametrize("name", ["need_weights", "average_attn_weights", "is_causal"])
def test_flags_of_multihead_attention(name):
    x, mask = torch.randn(3, 1, 8), torch.zeros(3, 3)
    text = message(lambda: MultiheadAttention(8, 2)(x, x, x, attn_mask=mask, **{name: "x"}))
    assert text == f"MultiheadAttention: {name} must be a bool, got str."


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base": float("inf")}, "base is inf; it must be finite"),
        ({"base": float("nan")}, "base is nan; it must be finite"),
        ({"base": None}, "base must be a number, got NoneType"),
        ({"base": 0}, "base is 0; it must be greater than 0"),
        ({"dtype": torch.int32}, "dtype is torch.int32; supported are"),
        ({"dtype": "x"}, "dtype must be a torch.dtype, got 'x'"),
        ({"batch_first": "x"}, "batch_first must be a bool, got str"),
    ],
    ids=str,
)
def test_sinusoids(options, words):
    text = message(lambda: SinusoidalPositionalEncoding(8, 20, **options))
    assert text.startswith(f"SinusoidalPositionalEncoding: {words}")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((None,), "input must be a tensor of float32, bfloat16, float16 or float64, got NoneType"),
        ((torch.zeros(2, 3, 8, dtype=torch.int64),), "input must be a tensor of .* got torch.int64"),
        ((torch.zeros(2, 3, 8), 1.5), "offset must be an int, got float"),
        ((torch.zeros(2, 3, 8), None), "offset must be an int, got NoneType"),
        ((torch.zeros(2, 3, 8), True), "offset must be an int, got bool"),
    ],
    ids=["None", "integers", "a float as offset", "None as offset", "a bool as offset"],
)
def test_calls_of_sinusoids(arguments, words):
    with pytest.raises(TypeError, match=f"^SinusoidalPositionalEncoding: {words}.$"):
        SinusoidalPositionalEncoding(8, 20)(*arguments)
