"""bigmodel.compat.apex against apex's signatures, and against float64 in values, gradients and dtypes."""

import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from bigmodel.compat import apex
from bigmodel.compat.apex.contrib.layer_norm import FastLayerNorm
from bigmodel.compat.apex.contrib.layer_norm.layer_norm import FastLayerNormFN
from bigmodel.compat.apex.normalization import (
    FusedLayerNorm,
    FusedRMSNorm,
    MixedFusedLayerNorm,
    MixedFusedRMSNorm,
    fused_layer_norm,
)
from bigmodel.compat.apex.transformer import layers

ROOT = "bigmodel.compat.apex"
ROWS, COLS, EPS = 6, 40, 1e-3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)

# --- names and signatures, as apex has them ---------------------------------------------------------------------------

PUBLIC = {
    "": ["normalization"],
    "normalization": ["FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"],
    "normalization.fused_layer_norm": [
        "FusedLayerNorm",
        "FusedLayerNormAffineFunction",
        "FusedLayerNormAffineMixedDtypesFunction",
        "FusedLayerNormFunction",
        "FusedRMSNorm",
        "FusedRMSNormAffineFunction",
        "FusedRMSNormAffineMixedDtypesFunction",
        "FusedRMSNormFunction",
        "MixedFusedLayerNorm",
        "MixedFusedRMSNorm",
        "fused_layer_norm",
        "fused_layer_norm_affine",
        "fused_rms_norm",
        "fused_rms_norm_affine",
        "manual_rms_norm",
        "mixed_dtype_fused_layer_norm_affine",
        "mixed_dtype_fused_rms_norm_affine",
    ],
    "contrib.layer_norm": ["FastLayerNorm"],
    "contrib.layer_norm.layer_norm": ["FastLayerNorm", "FastLayerNormFN", "_fast_layer_norm"],
    "transformer.layers": ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"],
    "transformer.layers.layer_norm": ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"],
    "_autocast_utils": ["_cast_if_autocast_enabled"],
}

MODULE = "(normalized_shape, eps=1e-05, elementwise_affine=True, memory_efficient=False)"
MIXED_MODULE = "(normalized_shape, eps=1e-05, *, memory_efficient=False, **kwargs)"
LAYER_NORM_FUNCTION = "(ctx, input, weight, bias, normalized_shape, eps, memory_efficient=False)"
RMS_NORM_FUNCTION = "(ctx, input, weight, normalized_shape, eps, memory_efficient=False)"
PLAIN_FUNCTION = "(ctx, input, normalized_shape, eps, memory_efficient=False)"
SIGNATURES = [
    (FusedLayerNorm, MODULE),
    (FusedRMSNorm, MODULE),
    (MixedFusedLayerNorm, MIXED_MODULE),
    (MixedFusedRMSNorm, MIXED_MODULE),
    (FastLayerNorm, "(hidden_size, eps=1e-05, memory_efficient=False)"),
    (
        layers.FusedLayerNorm,
        "(normalized_shape, eps=1e-05, elementwise_affine=True, *, sequence_parallel_enabled=False)",
    ),
    (layers.MixedFusedLayerNorm, "(normalized_shape, eps=1e-05, **kwargs)"),
    (layers.FastLayerNorm, "(hidden_size, eps=1e-05, *, sequence_parallel_enabled=False)"),
    (fused_layer_norm.fused_layer_norm, "(input, normalized_shape, eps=1e-06, memory_efficient=False)"),
    (
        fused_layer_norm.fused_layer_norm_affine,
        "(input, weight, bias, normalized_shape, eps=1e-06, memory_efficient=False)",
    ),
    (
        fused_layer_norm.mixed_dtype_fused_layer_norm_affine,
        "(input, weight, bias, normalized_shape, eps=1e-06, memory_efficient=False)",
    ),
    (fused_layer_norm.fused_rms_norm, "(input, normalized_shape, eps=1e-06, memory_efficient=False)"),
    (fused_layer_norm.fused_rms_norm_affine, "(input, weight, normalized_shape, eps=1e-06, memory_efficient=False)"),
    (
        fused_layer_norm.mixed_dtype_fused_rms_norm_affine,
        "(input, weight, normalized_shape, eps=1e-06, memory_efficient=False)",
    ),
    (fused_layer_norm.manual_rms_norm, "(input, normalized_shape, weight, eps)"),
    (fused_layer_norm.FusedLayerNormFunction.forward, PLAIN_FUNCTION),
    (fused_layer_norm.FusedLayerNormAffineFunction.forward, LAYER_NORM_FUNCTION),
    (fused_layer_norm.FusedLayerNormAffineMixedDtypesFunction.forward, LAYER_NORM_FUNCTION),
    (fused_layer_norm.FusedRMSNormFunction.forward, PLAIN_FUNCTION),
    (fused_layer_norm.FusedRMSNormAffineFunction.forward, RMS_NORM_FUNCTION),
    (fused_layer_norm.FusedRMSNormAffineMixedDtypesFunction.forward, RMS_NORM_FUNCTION),
    (FastLayerNormFN.forward, "(ctx, x, gamma, beta, epsilon, memory_efficient=False)"),
]


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_is_at_apexs_path(path):
    module = importlib.import_module(f"{ROOT}.{path}".rstrip("."))
    assert [name for name in PUBLIC[path] if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    "callable_, expected",
    SIGNATURES,
    ids=[f"{c.__module__}.{c.__qualname__}".removeprefix(ROOT) for c, _ in SIGNATURES],
)
def test_signature(callable_, expected):
    signature = inspect.signature(callable_)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == expected


def test_mixed_modules_are_subclasses_as_in_apex():
    assert issubclass(MixedFusedLayerNorm, FusedLayerNorm)
    assert issubclass(MixedFusedRMSNorm, FusedRMSNorm)
    assert issubclass(layers.FusedLayerNorm, FusedLayerNorm)
    assert issubclass(layers.MixedFusedLayerNorm, MixedFusedLayerNorm)
    assert issubclass(layers.FastLayerNorm, FastLayerNorm)


def test_replacing_the_import_is_enough():
    script = (
        "import apex\nfrom apex.normalization import FusedRMSNorm as N\nprint(N(4).eps, apex.normalization.__name__)"
    )
    moved = re.sub(r"\bimport apex\b", f"import {ROOT} as apex", script)
    moved = re.sub(r"\bfrom apex\b", f"from {ROOT}", moved)
    done = subprocess.run([sys.executable, "-c", moved], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1e-05", f"{ROOT}.normalization"]


# --- values, gradients, dtypes ----------------------------------------------------------------------------------------


def reference(x, weight, bias, centred, eps=EPS):
    x = x - x.mean(-1, keepdim=True) if centred else x
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def tensors(input_dtype, weight_dtype, seed=0):
    """x, weight, bias; weights are at least 0.5 from zero, which memory_efficient needs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, ROWS // 2, COLS, generator=generator) * 3 + 1
    weight = torch.rand(COLS, generator=generator) + 0.5
    bias = torch.randn(COLS, generator=generator)
    return x.to(input_dtype), weight.to(weight_dtype), bias.to(weight_dtype)


def assert_close(actual, expected, dtype):
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE[dtype] * expected.abs().max().item()


f = fused_layer_norm
# name: (call(x, weight, bias, memory_efficient), centred, affine parameters, mixed)
FORMS = {
    "fused_layer_norm": (lambda x, w, b, m: f.fused_layer_norm(x, (COLS,), EPS, m), True, 0, False),
    "fused_layer_norm_affine": (lambda x, w, b, m: f.fused_layer_norm_affine(x, w, b, (COLS,), EPS, m), True, 2, False),
    "mixed_dtype_fused_layer_norm_affine": (
        lambda x, w, b, m: f.mixed_dtype_fused_layer_norm_affine(x, w, b, (COLS,), EPS, m), True, 2, True
    ),
    "fused_rms_norm": (lambda x, w, b, m: f.fused_rms_norm(x, (COLS,), EPS, m), False, 0, False),
    "fused_rms_norm_affine": (lambda x, w, b, m: f.fused_rms_norm_affine(x, w, (COLS,), EPS, m), False, 1, False),
    "mixed_dtype_fused_rms_norm_affine": (
        lambda x, w, b, m: f.mixed_dtype_fused_rms_norm_affine(x, w, (COLS,), EPS, m), False, 1, True
    ),
    "FusedLayerNormFunction": (lambda x, w, b, m: f.FusedLayerNormFunction.apply(x, (COLS,), EPS, m), True, 0, False),
    "FusedLayerNormAffineFunction": (
        lambda x, w, b, m: f.FusedLayerNormAffineFunction.apply(x, w, b, (COLS,), EPS, m), True, 2, False
    ),
    "FusedLayerNormAffineMixedDtypesFunction": (
        lambda x, w, b, m: f.FusedLayerNormAffineMixedDtypesFunction.apply(x, w, b, (COLS,), EPS, m), True, 2, True
    ),
    "FusedRMSNormFunction": (lambda x, w, b, m: f.FusedRMSNormFunction.apply(x, (COLS,), EPS, m), False, 0, False),
    "FusedRMSNormAffineFunction": (
        lambda x, w, b, m: f.FusedRMSNormAffineFunction.apply(x, w, (COLS,), EPS, m), False, 1, False
    ),
    "FusedRMSNormAffineMixedDtypesFunction": (
        lambda x, w, b, m: f.FusedRMSNormAffineMixedDtypesFunction.apply(x, w, (COLS,), EPS, m), False, 1, True
    ),
    "FastLayerNormFN": (lambda x, w, b, m: FastLayerNormFN.apply(x, w, b, EPS, m), True, 2, True),
}  # fmt: skip
MIXES = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients(name, dtypes, memory_efficient):
    call, centred, affine, mixed = FORMS[name]
    input_dtype, weight_dtype = dtypes
    leaves = [leaf.requires_grad_() for leaf in tensors(*dtypes)[: 1 + affine]]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = call(*leaves, *[None] * (2 - affine), memory_efficient)
    expected = reference(*exact, *[None] * (2 - affine), centred)

    out_dtype = weight_dtype if mixed else input_dtype
    assert out.dtype is out_dtype and out.shape == leaves[0].shape
    assert_close(out, expected, out_dtype)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out_dtype)
    coarsest = max((*dtypes, out_dtype), key=TOLERANCE.get)
    for actual, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert_close(actual, wanted, coarsest)


@pytest.mark.parametrize(
    "input_dtype, weight_dtype",
    [(x, w) for x in DTYPES for w in [None, *DTYPES] if w is not torch.float64 or x is torch.float64],
)
def test_manual_rms_norm_returns_the_dtype_of_apexs_arithmetic(input_dtype, weight_dtype):
    x, weight, _ = tensors(input_dtype, weight_dtype or torch.float32)
    weight = weight if weight_dtype else None
    step = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
        step = step.to(weight.dtype)
    expected_dtype = (step if weight is None else weight * step).dtype
    out = f.manual_rms_norm(x, (COLS,), weight, EPS)
    assert out.dtype is expected_dtype
    exact = reference(x.double(), None if weight is None else weight.double(), None, False)
    assert_close(out, exact, out.dtype)


# --- modules ----------------------------------------------------------------------------------------------------------

MODULES = {
    "FusedLayerNorm": (FusedLayerNorm, True, False),
    "FusedRMSNorm": (FusedRMSNorm, False, False),
    "MixedFusedLayerNorm": (MixedFusedLayerNorm, True, True),
    "MixedFusedRMSNorm": (MixedFusedRMSNorm, False, True),
    "FastLayerNorm": (FastLayerNorm, True, True),
    "transformer.FusedLayerNorm": (layers.FusedLayerNorm, True, False),
    "transformer.MixedFusedLayerNorm": (layers.MixedFusedLayerNorm, True, True),
    "transformer.FastLayerNorm": (layers.FastLayerNorm, True, True),
}


def module_of(name, dtype=torch.float32):
    """The module with random parameters and eps=EPS, and whether it centres and is mixed."""
    cls, centred, mixed = MODULES[name]
    module = cls(COLS, eps=EPS).to(dtype)
    _, weight, bias = tensors(dtype, dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        if centred:
            module.bias.copy_(bias)
    return module, centred, mixed


@pytest.mark.parametrize("name", MODULES)
def test_module_computes_in_the_dtype_of_its_kind(name):
    module, centred, mixed = module_of(name)
    x, weight, bias = tensors(torch.bfloat16, torch.float32)
    out = module(x)
    assert out.dtype is (torch.float32 if mixed else torch.bfloat16)
    assert_close(out, reference(x.double(), weight.double(), bias.double() if centred else None, centred), out.dtype)


@pytest.mark.parametrize("name", MODULES)
def test_fresh_parameters_and_reset(name):
    cls, centred, _ = MODULES[name]
    module = cls(COLS)
    fresh = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    assert list(fresh) == (["weight", "bias"] if centred else ["weight"])
    assert fresh["weight"].eq(1).all() and (not centred or fresh["bias"].eq(0).all())
    with torch.no_grad():
        module.weight.fill_(5)
        if centred:
            module.bias.fill_(5)
    module.reset_parameters()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_goes_to_torch_and_back(name):
    module, centred, _ = module_of(name)
    stock = (nn.LayerNorm if centred else nn.RMSNorm)(COLS, eps=EPS)
    stock.load_state_dict(module.state_dict(), strict=True)
    back = type(module)(COLS, eps=EPS)
    back.load_state_dict(stock.state_dict(), strict=True)
    x, _, _ = tensors(torch.float32, torch.float32)
    assert torch.equal(back(x), module(x))
    assert torch.allclose(stock(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "copy"])
@pytest.mark.parametrize("name", MODULES)
def test_pickle_and_deepcopy(name, duplicate):
    module, _, _ = module_of(name)
    other = duplicate(module)
    x, _, _ = tensors(torch.bfloat16, torch.float32)
    assert type(other) is type(module) and torch.equal(other(x), module(x))


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedRMSNorm])
def test_attributes_and_repr(cls):
    module = cls(8)
    assert module.normalized_shape == torch.Size([8]) and isinstance(module.normalized_shape, torch.Size)
    assert (module.eps, module.elementwise_affine, module.memory_efficient) == (1e-5, True, False)
    assert repr(module) == f"{cls.__name__}(torch.Size([8]), eps=1e-05, elementwise_affine=True)"
    assert FastLayerNorm(8).epsilon == 1e-5


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedRMSNorm])
def test_without_affine_parameters_and_over_two_dimensions(cls):
    module = cls([4, 10], eps=EPS, elementwise_affine=False)
    assert module.weight is None and not module.state_dict()
    x, _, _ = tensors(torch.float32, torch.float32)
    expected = reference(x.double(), None, None, cls is FusedLayerNorm)
    assert_close(module(x.view(2, 3, 4, 10)).view_as(expected), expected, torch.float32)
    assert cls([4, 10]).weight.shape == (4, 10)


def test_default_eps_is_1e_5_in_modules_and_1e_6_in_functions():
    x = torch.full((1, COLS), 1e-3)
    x[0, ::2] *= -1
    for module, function in [(FusedLayerNorm(COLS), f.fused_layer_norm), (FusedRMSNorm(COLS), f.fused_rms_norm)]:
        assert torch.allclose(module(x).abs(), torch.tensor(1e-3 / (1e-6 + 1e-5) ** 0.5), rtol=1e-5)
        assert torch.allclose(function(x, (COLS,)).abs(), torch.tensor(1e-3 / (1e-6 + 1e-6) ** 0.5), rtol=1e-5)


@pytest.mark.parametrize("cls", [MixedFusedLayerNorm, MixedFusedRMSNorm, layers.MixedFusedLayerNorm])
def test_mixed_modules_are_always_affine_and_ignore_nothing(cls):
    with pytest.warns(UserWarning, match="always affine"):
        assert cls(4, elementwise_affine=True).weight.shape == (4,)
    with pytest.raises(RuntimeError, match="elementwise_affine=False"):
        cls(4, elementwise_affine=False)
    with pytest.raises(TypeError, match="unknown argument 'bias'"):
        cls(4, bias=False)


@pytest.mark.parametrize("cls", [layers.FusedLayerNorm, layers.MixedFusedLayerNorm, layers.FastLayerNorm])
@pytest.mark.parametrize("enabled", [False, True])
def test_sequence_parallel_mark_is_on_module_and_parameters(cls, enabled):
    module = cls(4, sequence_parallel_enabled=enabled)
    assert [marked.sequence_parallel_enabled for marked in (module, module.weight, module.bias)] == [enabled] * 3
    assert cls(4).weight.sequence_parallel_enabled is False


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm, FastLayerNorm])
def test_memory_efficient_module_keeps_the_output_and_not_the_input(cls):
    kept = []
    x = torch.randn(ROWS, COLS, requires_grad=True)
    module = cls(COLS, memory_efficient=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = module(x)
    assert out.data_ptr() in kept and x.data_ptr() not in kept


# --- autocast, compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_autocast_casts_every_argument_as_apex_does(name):
    module, centred, _ = module_of(name)
    x, weight, bias = (t.requires_grad_() for t in tensors(torch.float32, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype is torch.bfloat16
    rounded = [t.detach().bfloat16().double() for t in (x, weight, bias)]
    assert_close(out, reference(*rounded[:2], rounded[2] if centred else None, centred), torch.bfloat16)
    out.sum().backward()
    assert x.grad.dtype is torch.float32 and module.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("name", [name for name in FORMS if not name.endswith(("Function", "FN"))])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float16])
def test_functions_return_the_autocast_dtype(name, input_dtype):
    call, _, affine, _ = FORMS[name]
    tensors_ = tensors(input_dtype, torch.float32)[: 1 + affine]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(*tensors_, *[None] * (2 - affine), False)
    rounded = [tensor.bfloat16() for tensor in tensors_]
    assert torch.equal(out, call(*rounded, *[None] * (2 - affine), False))


def test_autocast_leaves_float64_and_other_devices_and_apply_alone():
    x, weight, bias = tensors(torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert f.fused_rms_norm(x.double(), (COLS,)).dtype is torch.float64
        assert f.FusedLayerNormAffineFunction.apply(x, weight, bias, (COLS,), EPS).dtype is torch.float32
        meta = apex._autocast_utils._cast_if_autocast_enabled(x.to("meta"), (COLS,), 1e-6)
    assert meta[0].dtype is torch.float32 and meta[1:] == ((COLS,), 1e-6)


@pytest.mark.parametrize("name", ["FusedRMSNorm", "MixedFusedLayerNorm", "FastLayerNorm"])
def test_compiles_without_graph_breaks(name):
    module, _, _ = module_of(name)
    x, _, _ = tensors(torch.bfloat16, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x.float()), module(x.float()))


# --- what is not provided ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement, error, hint",
    [
        (f"from {ROOT} import amp", ImportError, r"no 'amp' \(use torch.amp\)"),
        (f"import {ROOT}.amp", ImportError, r"no 'amp'"),
        (f"from {ROOT}.optimizers import FusedSGD", ImportError, r"no 'optimizers.FusedSGD' \(use bigmodel.optim.SGD"),
        (f"from {ROOT}.normalization import GroupNorm", ImportError, r"no 'normalization.GroupNorm'"),
        (f"from {ROOT}.contrib.xentropy import SoftmaxCrossEntropyLoss", ImportError, r"no 'contrib.xentropy'"),
        (f"import {ROOT} as apex; apex.amp.initialize", AttributeError, r"no 'amp' \(use torch.amp\)"),
    ],
)
def test_what_is_missing_is_named_with_what_exists(statement, error, hint):
    with pytest.raises(error, match=hint) as caught:
        exec(statement)
    assert "it provides normalization, normalization.fused_layer_norm, contrib.layer_norm" in str(caught.value)


def test_missing_names_do_not_break_hasattr():
    assert not hasattr(apex, "amp") and not hasattr(fused_layer_norm, "fused_layer_norm_cuda")
