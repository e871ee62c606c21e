"""bigmodel.compat.apex.transformer's softmax: apex's names and signatures, its meaning of masks, none of its limits."""

import importlib
import inspect
import itertools

import pytest
import torch

from bigmodel.compat.apex import transformer
from bigmodel.compat.apex.transformer import AttnMaskType
from bigmodel.compat.apex.transformer.functional import fused_softmax
from bigmodel.compat.apex.transformer.functional.fused_softmax import (
    FusedScaleMaskSoftmax,
    GenericFusedScaleMaskSoftmax,
    generic_scaled_masked_softmax,
    scaled_masked_softmax,
    scaled_upper_triang_masked_softmax,
)

CAUSAL = AttnMaskType.causal
ROOT = "bigmodel.compat.apex.transformer"
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 4, 8, 24), (1, 2, 3, 4099), (1, 1, 2, 20000)]  # apex: sk > 16, % 4, <= 16384

PUBLIC = {
    "": ["AttnMaskType", "AttnType", "LayerType", "functional", "layers"],
    "enums": ["AttnMaskType", "AttnType", "LayerType", "ModelType"],
    "functional": ["FusedScaleMaskSoftmax"],
    "functional.fused_softmax": [
        "FusedScaleMaskSoftmax", "GenericFusedScaleMaskSoftmax", "GenericScaledMaskedSoftmax", "ScaledMaskedSoftmax",
        "ScaledSoftmax", "ScaledUpperTriangMaskedSoftmax", "generic_scaled_masked_softmax", "scaled_masked_softmax",
        "scaled_upper_triang_masked_softmax",
    ],
}  # fmt: skip
SIGNATURES = {
    FusedScaleMaskSoftmax: "input_in_fp16, input_in_bf16, attn_mask_type, scaled_masked_softmax_fusion, mask_func, "
    "softmax_in_fp32, scale",
    GenericFusedScaleMaskSoftmax: "input_in_fp16, input_in_bf16, scaled_masked_softmax_fusion, mask_func, "
    "softmax_in_fp32, scale",
    FusedScaleMaskSoftmax.forward: "self, input, mask",
    FusedScaleMaskSoftmax.is_kernel_available: "self, mask, b, np, sq, sk",
    FusedScaleMaskSoftmax.forward_fused_softmax: "self, input, mask",
    FusedScaleMaskSoftmax.forward_torch_softmax: "self, input, mask",
    scaled_masked_softmax: "inputs, mask, scale",
    generic_scaled_masked_softmax: "inputs, mask, scale",
    scaled_upper_triang_masked_softmax: "inputs, _, scale",
    fused_softmax.ScaledMaskedSoftmax.forward: "ctx, inputs, mask, scale",
    fused_softmax.GenericScaledMaskedSoftmax.forward: "ctx, inputs, mask, scale",
    fused_softmax.ScaledSoftmax.forward: "ctx, inputs, scale",
    fused_softmax.ScaledUpperTriangMaskedSoftmax.forward: "ctx, inputs, scale",
}


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_is_at_apexs_path(path):
    module = importlib.import_module(f"{ROOT}.{path}".rstrip("."))
    assert [name for name in PUBLIC[path] if not hasattr(module, name)] == []


@pytest.mark.parametrize("callable_", SIGNATURES, ids=lambda c: c.__qualname__)
def test_signature(callable_):
    assert ", ".join(inspect.signature(callable_).parameters) == SIGNATURES[callable_]


def test_enums_have_apexs_values():
    members = {
        kind.__name__: {m.name: m.value for m in kind}
        for kind in (AttnMaskType, transformer.AttnType, transformer.LayerType)
    }
    assert members == {
        "AttnMaskType": {"padding": 1, "causal": 2},
        "AttnType": {"self_attn": 1, "cross_attn": 2},
        "LayerType": {"encoder": 1, "decoder": 2},
    }


# --- the functions ----------------------------------------------------------------------------------------------------


def exact(inputs, masked, scale):
    """In float64: masked entries and rows of nothing else are exactly zero."""
    z = (inputs.double() * scale).masked_fill(masked, torch.finfo(torch.float64).min)
    return torch.softmax(z, -1) * ~masked


def compare(function, inputs, masked, scale):
    """Values and gradients of function(inputs) against float64."""
    ours, reference = inputs.detach().requires_grad_(), inputs.detach().double().requires_grad_()
    out, right = function(ours), exact(reference, masked, scale)
    grad = torch.randn_like(right).to(inputs.dtype)
    out.backward(grad)
    right.backward(grad.double())
    assert out.dtype is inputs.dtype and out.shape == inputs.shape
    assert not out[masked.expand_as(out)].any()
    for own, expected in ((out, right), (ours.grad, reference.grad)):
        assert (own - expected).abs().max() <= TOLERANCE[inputs.dtype] * max(expected.abs().max().item(), 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [scaled_masked_softmax, generic_scaled_masked_softmax])
def test_masked(function, shape, dtype):
    b, _, sq, sk = shape
    masked = torch.rand(b, 1, sq, sk) < 0.4
    masked[0, 0, 0] = True
    inputs = torch.randn(shape, dtype=torch.float64).to(dtype)
    for mask in (masked, masked[:1].to(torch.uint8)):
        compare(lambda x, mask=mask: function(x, mask, 0.5), inputs, mask.bool(), 0.5)
    compare(lambda x: function(x, None, 2.0), inputs, torch.zeros(sq, sk, dtype=torch.bool), 2.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (24, 24), (1, 9), (4, 9)], ids=str)
def test_causal(sizes, dtype):
    inputs = torch.randn(2, 3, *sizes, dtype=torch.float64).to(dtype)
    masked = torch.ones(sizes, dtype=torch.bool).triu(sizes[1] - sizes[0] + 1)
    compare(lambda x: scaled_upper_triang_masked_softmax(x, None, 0.5), inputs, masked, 0.5)
    flat = fused_softmax.ScaledUpperTriangMaskedSoftmax.apply(inputs.flatten(0, 1), 0.5)
    assert torch.equal(flat.view_as(inputs), scaled_upper_triang_masked_softmax(inputs, "unread", 0.5))


def test_scores_below_minus_ten_thousand_are_numbers_and_ones_alone_mask():
    inputs = torch.tensor([[[[-20000.0, -20001.0, 0.0]]]])
    masked = torch.tensor([[[[0, 0, 1]]]], dtype=torch.uint8)
    out = scaled_masked_softmax(inputs, masked, 1.0)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.7310586, 0.2689414, 0.0]))
    assert torch.equal(scaled_masked_softmax(inputs, 2 * masked, 1.0), scaled_masked_softmax(inputs, None, 1.0))


# --- the modules ------------------------------------------------------------------------------------------------------


def fill(scores, mask):
    return scores.masked_fill(mask, -10000.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("generic", [False, True])
def test_fused_and_unfused_modules_agree(generic, dtype):
    scores, masked = torch.randn(4, 3, 6, 10).to(dtype), torch.rand(4, 1, 6, 10) < 0.4
    masked[..., 0] = False
    flags = (dtype is torch.float16, dtype is torch.bfloat16)
    for in_fp32, scale, mask in itertools.product((True, False), (None, 0.25), (masked, None)):
        if scale is not None and not in_fp32:
            continue
        results = []
        for fusion in (True, False):
            kind = () if generic else (AttnMaskType.padding,)
            cls = GenericFusedScaleMaskSoftmax if generic else FusedScaleMaskSoftmax
            results.append(cls(*flags, *kind, fusion, fill, in_fp32, scale)(scores, mask))
        assert results[0].dtype is results[1].dtype is dtype
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-2)


def test_causal_module_with_and_without_a_mask():
    module = FusedScaleMaskSoftmax(False, True, AttnMaskType.causal, True, fill, True, 0.5)
    scores = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padded = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    padded[1, ..., 4:] = True
    for mask, masked in ((None, causal), (causal[None, None], causal), (padded, causal | padded)):
        compare(lambda x, mask=mask: module(x, mask), scores, masked.expand(2, 3, 6, 6), 0.5)
    unfused = FusedScaleMaskSoftmax(False, True, AttnMaskType.causal, False, fill, True, 0.5)
    assert torch.equal(unfused(scores, None), module(scores, None))


def test_mask_func_is_called_for_what_it_alone_understands():
    calls = []
    added = torch.randn(1, 1, 6, 6)
    module = FusedScaleMaskSoftmax(
        False, False, AttnMaskType.padding, True, lambda s, m: calls.append(m) or s + m, True, 2.0
    )
    scores = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(module(scores, added), torch.softmax(2 * scores + added, -1))
    assert calls == [added] and not module.is_kernel_available(added, *scores.shape)
    module(scores, torch.zeros(1, 1, 6, 6, dtype=torch.bool))
    assert len(calls) == 1


def test_autocast_casts_as_apex_does():
    scores, masked = torch.randn(2, 3, 6, 6, requires_grad=True), torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    module = FusedScaleMaskSoftmax(False, True, AttnMaskType.padding, True, fill, True, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [
            module(scores, masked),
            scaled_masked_softmax(scores, masked, 1.0),
            scaled_masked_softmax(scores, None, 1.0),
            generic_scaled_masked_softmax(scores, masked, 1.0),
            scaled_upper_triang_masked_softmax(scores, None, 1.0),
        ]
    assert all(out.dtype is torch.bfloat16 for out in outs)
    outs[0].sum().backward()
    assert scores.grad.dtype is torch.float32


def test_compiles_in_one_graph():
    module = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, True, fill, True, 0.5)
    scores, masked = torch.randn(2, 3, 6, 6), torch.rand(2, 1, 6, 6) < 0.3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, masked), module(scores, masked))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: scaled_masked_softmax(torch.zeros(2, 3, 4), None, 1.0), ValueError, "inputs has shape (2, 3, 4)"),
        (lambda: scaled_upper_triang_masked_softmax(torch.zeros(3, 4), 0, 1.0), ValueError, "shape (3, 4)"),
        (lambda: scaled_masked_softmax(torch.zeros(1, 1, 2, 2), torch.zeros(2, 2), 1.0), TypeError, "mask has dtype"),
        (lambda: generic_scaled_masked_softmax("x", None, 1.0), TypeError, "inputs must be a torch.Tensor, got str"),
        (lambda: generic_scaled_masked_softmax(torch.zeros(1, 1, 2, 2), [1], 1.0), TypeError, "mask must be a torch.T"),
        (lambda: FusedScaleMaskSoftmax(True, True, CAUSAL, True, fill, True, None), RuntimeError, "both True"),
        (lambda: FusedScaleMaskSoftmax(True, False, CAUSAL, True, fill, False, 1.0), RuntimeError, "scale"),
        (lambda: FusedScaleMaskSoftmax(True, False, 2, True, fill, True, None), ValueError, "attn_mask_type is 2"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_what_apex_had_and_is_not_here_is_named():
    with pytest.raises(AttributeError, match="no 'transformer.functional.fused_apply_rotary_pos_emb'"):
        transformer.functional.fused_apply_rotary_pos_emb  # noqa: B018
