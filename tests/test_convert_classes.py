"""What bigmodel.convert takes for a norm: torch's own and look-alikes. What it refuses: test_convert_refused.py."""

import copy
import inspect
import itertools

import pytest
import torch
from lookalike import WIDTH, Norm
from torch import nn
from torch.nn import functional as F

import bigmodel

BF16, F32 = torch.bfloat16, torch.float32


def converted(module):
    """A converted copy, which must have been replaced."""
    module = copy.deepcopy(module)
    report = bigmodel.convert(module)
    assert len(report.replaced) == 1 and not report.left, str(report)
    return module


def results(module, input):
    """Output, gradient of the input, gradients of the parameters."""
    input = input.clone().requires_grad_()
    out = module(input)
    grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return [out, *torch.autograd.grad(out, [input, *module.parameters()], grad_out)]


def assert_same(module, input, tolerance=1e-5):
    fused = converted(module)
    for got, expected in zip(results(fused, input), results(module, input), strict=True):
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    return fused


# --- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(WIDTH), (5, WIDTH)),
        (nn.LayerNorm(WIDTH, eps=1e-12), (2, 3, WIDTH)),
        (nn.LayerNorm(WIDTH, bias=False), (5, WIDTH)),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), (5, WIDTH)),
        (nn.LayerNorm((4, 8)), (2, 3, 4, 8)),
        (nn.LayerNorm((4, 8), elementwise_affine=False), (3, 4, 8)),
        (nn.RMSNorm(WIDTH), (5, WIDTH)),
        (nn.RMSNorm(WIDTH, eps=1e-3), (2, 3, WIDTH)),
        (nn.RMSNorm(WIDTH, elementwise_affine=False), (5, WIDTH)),
        (nn.RMSNorm((4, 8)), (2, 3, 4, 8)),
        (nn.RMSNorm(WIDTH, dtype=torch.float64), (5, WIDTH)),
        (nn.LayerNorm(WIDTH, dtype=torch.float64), (5, WIDTH)),
    ],
    ids=str,
)
def test_torch_norms_in_every_form(module, shape):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dtype = next((parameter.dtype for parameter in module.parameters()), F32)
    fused = assert_same(module, torch.randn(shape, dtype=dtype))
    assert isinstance(fused, type(module))
    assert type(fused).__name__ == type(module).__name__
    assert "fused by bigmodel" in repr(fused) and repr(module)[:-1] in repr(fused)
    assert inspect.signature(fused.forward).parameters.keys() == inspect.signature(module.forward).parameters.keys()
    (argument,) = inspect.signature(module.forward).parameters
    input = torch.randn(shape, dtype=dtype)
    assert torch.equal(fused(**{argument: input}), fused(input))


def test_a_frozen_weight_stays_frozen():
    norm = nn.RMSNorm(WIDTH).requires_grad_(False)
    bigmodel.convert(norm)
    norm(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert norm.weight.grad is None


# --- look-alikes that are replaced ------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """Nothing in it is called norm, weight or bias, and the bias comes first."""

    def __init__(self):
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.variance_epsilon, self.temperature = 1e-4, 3.0

    def forward(self, features):
        centred = features - features.mean(-1, keepdim=True)
        deviation = (centred.var(-1, keepdim=True, correction=0) + self.variance_epsilon).sqrt()
        return centred / deviation * self.gain + self.shift


class LayerNorm(nn.Module):
    """With its eps written in, as in many small GPTs."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class ClassEps(nn.Module):
    eps = 1e-3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, /):
        return self.scale * F.rms_norm(x, x.shape[-1:], None, self.eps)


class RMSNorm(Norm):
    """Not what its name says: a layer norm without a bias."""

    def normed(self, x):
        return super().normed(x - x.mean(-1, keepdim=True))


class ZeroCentredLayerNorm(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class BackToInput(nn.LayerNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states.float()).to(hidden_states.dtype)


class AlwaysFloat32(Norm):
    def forward(self, x):
        return self.normed(x.float()) * self.weight.float()


class WeightlessFloat32(nn.LayerNorm):
    def __init__(self):
        super().__init__(WIDTH, elementwise_affine=False)

    def forward(self, input):
        return super().forward(input.float())


class PairOfSettings(Norm):
    def __init__(self):
        super().__init__()
        self.settings = {"shapes": [(WIDTH,)], "dtype": torch.float32}


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Norm, "rms_norm, returns the promoted dtype"),
        (Renamed, "layer_norm, returns the promoted dtype"),
        (LayerNorm, "layer_norm, returns the input's dtype"),
        (ClassEps, "rms_norm, returns the promoted dtype"),
        (RMSNorm, "layer_norm, returns the promoted dtype"),
        (lambda: ZeroCentredLayerNorm(WIDTH), "layer_norm, 1 + weight, returns the input's dtype"),
        (lambda: BackToInput(WIDTH), "layer_norm, returns the input's dtype"),
        (AlwaysFloat32, "rms_norm, returns float32"),
        (WeightlessFloat32, "layer_norm, returns float32"),
        (PairOfSettings, "rms_norm, returns the promoted dtype"),
    ],
)
def test_look_alikes_are_replaced(cls, what):
    module = cls()
    fused = assert_same(module, torch.randn(2, 5, WIDTH) + 0.5)
    assert [entry.what for entry in bigmodel.revert(fused).replaced] == ["its own forward"]
    assert [entry.what for entry in bigmodel.convert(fused).replaced] == [what]
    for input_dtype, weight_dtype in itertools.product((F32, BF16), repeat=2):
        input = torch.randn(2, WIDTH).to(input_dtype)
        try:
            expected = module.to(weight_dtype)(input)
        except RuntimeError:  # stock's layer_norm refuses a float32 input with a bfloat16 weight
            continue
        assert fused.to(weight_dtype)(input).dtype is expected.dtype


class Decoys(Norm):
    """Two attributes of the same value, of which only the second is its eps."""

    def __init__(self):
        super().__init__()
        self.eps = self.variance_epsilon = 1e-3

    def normed(self, x):
        return F.rms_norm(x, x.shape[-1:], None, self.variance_epsilon)


def test_eps_is_the_attribute_that_forward_reads():
    norm, input = Decoys(), torch.randn(3, WIDTH)
    fused = converted(norm)
    fused.eps = norm.eps = 5.0
    torch.testing.assert_close(fused(input), norm(input))
    fused.variance_epsilon = norm.variance_epsilon = 5.0
    torch.testing.assert_close(fused(input), norm(input))


def test_a_compiled_forward_is_probed_uncompiled():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    class CompiledNorm(Norm):
        forward = torch.compile(Norm.forward, backend=backend)

    norm, input = CompiledNorm(), torch.randn(3, WIDTH)
    torch.testing.assert_close(converted(norm)(input), Norm.forward(norm, input))


def test_a_changed_eps_is_followed():
    norm, stock = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, eps=0.5)
    bigmodel.convert(norm)
    norm.eps = 0.5
    input = torch.randn(3, WIDTH)
    torch.testing.assert_close(norm(input), stock(input))
