"""Classes that look like a norm, each off in one point: bigmodel.convert must leave them and say why."""

import re

import pytest
import torch
from lookalike import WIDTH, Norm
from torch import nn
from torch.nn import functional as F

import bigmodel


class EpsOutside(Norm):
    def normed(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class OtherEpsOutside(Norm):
    """Its own eps would hide where the other one is added."""

    def __init__(self):
        super().__init__(eps=0.25)

    def normed(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


class EpsAsFloor(Norm):
    def normed(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).clamp(min=self.eps).rsqrt()


class UncentredNumerator(Norm):
    def normed(self, x):
        return x * (x.var(-1, keepdim=True, correction=0) + self.eps).rsqrt()


class ClippedMean(Norm):
    def normed(self, x):
        deviation = x.std(-1, keepdim=True)
        return super().normed(x - x.mean(-1, keepdim=True).clamp(-deviation, deviation))


class UnbiasedVariance(Norm):
    def normed(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * (x.var(-1, keepdim=True) + self.eps).rsqrt()


class MaxNorm(Norm):
    def normed(self, x):
        return x / (x.abs().amax(-1, keepdim=True) + self.eps)


class L2Norm(Norm):
    def normed(self, x):
        return F.normalize(x, dim=-1, eps=self.eps)


class SoftmaxNorm(Norm):
    def normed(self, x):
        return x.softmax(-1) * x.shape[-1]


class OtherDimension(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + self.eps)


class WholeTensor(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean() + self.eps)


class Grouped(Norm):
    def normed(self, x):
        return super().normed(x.unflatten(-1, (-1, 8))).flatten(-2)


class Partial(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x[..., : WIDTH // 4].pow(2).mean(-1, keepdim=True) + self.eps)


class Clamped(Norm):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class RepairsNan(Norm):
    def forward(self, x):
        return super().forward(x.nan_to_num())


class WeightInside(Norm):
    def forward(self, x):
        return self.normed(x * self.weight)


class ExponentialWeight(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight.exp()


class Scaled(Norm):
    def forward(self, x):
        return 2 * super().forward(x)


class BiasedRMSNorm(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return super().forward(x) + self.bias


class ThreeParameters(BiasedRMSNorm):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))


class DetachedStatistic(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + self.eps)


class FrozenInside(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight.detach()


class NoGradient(Norm):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Noisy(Norm):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class TrainingDependent(Norm):
    def forward(self, x):
        return super().forward(x) if self.training else self.normed(x)


class GradientDependent(Norm):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else self.normed(x)


class Counting(Norm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Recording(Norm):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


class MovingAverage(Norm):
    def __init__(self):
        super().__init__()
        self.mean_square = 1.0

    def forward(self, x):
        self.mean_square = 0.9 * self.mean_square + 0.1 * x.detach().pow(2).mean().item()
        return x * self.mean_square**-0.5 * self.weight


class ParameterWriter(Norm):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-10, 10)
        return super().forward(x)


class InPlace(Norm):
    def forward(self, x):
        with torch.no_grad():
            x.copy_(super().forward(x))
        return x


class Statistics(Norm):
    def forward(self, x):
        return super().forward(x), x.pow(2).mean(-1)


class ScalarGain(Norm):
    def __init__(self):
        super().__init__(1)


class PerHead(Norm):
    def normed(self, x):
        return super().normed(x.unflatten(-1, (-1, WIDTH)))

    def forward(self, x):
        return (self.normed(x) * self.weight).flatten(-2)


class ChannelsFirstImages(Norm):
    def forward(self, x):
        if x.dim() == 4:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


class TokensOfBatchOne(Norm):
    def forward(self, x):
        return super().forward(x) if x.dim() < 3 else super().forward(x) * (1 + (x.shape[0] > 1))


class Low(Norm):
    def forward(self, x):
        return super().forward(x) if x.dtype is torch.float32 else x * self.weight


class OddDtype(Norm):
    def forward(self, x):
        return super().forward(x).double()


class Gated(Norm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class Variadic(Norm):
    def forward(self, *x):
        return super().forward(*x)


class KeepsItsModel(Norm):
    def __init__(self):
        super().__init__()
        self.owner = [nn.Linear(2, 2)]


class KeepsATensor(Norm):
    def __init__(self):
        super().__init__()
        self.factor = torch.ones(WIDTH)


class KeepsALogger(Norm):
    def __init__(self):
        super().__init__()
        self.logger = type("Logger", (), {})()


class KeepsALock(Norm):
    def __init__(self):
        super().__init__()
        self.generator = (value for value in ())


class MatrixNorm(Norm):
    def __init__(self):
        super().__init__((4, WIDTH))


class Weightless(Norm):
    def __init__(self):
        super().__init__()
        self.weight = None

    def forward(self, x):
        return self.normed(x)


class WithBuffer(Norm):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))


class GatedByChildNorm(Norm):
    def __init__(self):
        super().__init__()
        self.activation = nn.SiLU()


class Final(Norm):
    def __init_subclass__(cls):
        raise TypeError("final")


class Crashing(Norm):
    def forward(self, x):
        raise KeyError("no such thing")


NEITHER = "computes neither layer_norm nor rms_norm"


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        *((cls, NEITHER) for cls in (
            EpsOutside, OtherEpsOutside, EpsAsFloor, UncentredNumerator, UnbiasedVariance, MaxNorm, L2Norm, SoftmaxNorm,
            OtherDimension, WholeTensor, Grouped, Partial, Clamped, WeightInside, ExponentialWeight, Scaled,
            BiasedRMSNorm, ClippedMean,
        )),
        (DetachedStatistic, "gradient differs"),
        (FrozenInside, "gradient differs"),
        (NoGradient, "gives no gradient"),
        (Noisy, "two calls on the same input differ"),
        (MovingAverage, "two calls on the same input differ"),
        (TrainingDependent, "depends on training"),
        (GradientDependent, "whether gradients are wanted"),
        (Counting, "changes its attributes"),
        (Recording, "changes its attributes"),
        (ParameterWriter, "writes to its parameters"),
        (InPlace, "writes to its input"),
        (Statistics, "does not return one tensor"),
        (RepairsNan, "NaN"),
        (ScalarGain, "inputs wider than its weight"),
        (PerHead, "inputs wider than its weight"),
        (ChannelsFirstImages, "4-D input"),
        (TokensOfBatchOne, "something else for a 3-D input"),
        (Low, "something else for bfloat16"),
        (OddDtype, "no rule gives the dtypes"),
        (Gated, r"takes \(x, gate=None\)"),
        (Variadic, r"takes \(\*x\)"),
        (KeepsATensor, "cannot be compared"),
        (KeepsALogger, "cannot be compared"),
        (KeepsALock, "cannot be copied"),
        (KeepsItsModel, "cannot be compared"),
        (MatrixNorm, "2 dimensions"),
        (Weightless, "no weight"),
        (WithBuffer, "buffers: steps"),
        (GatedByChildNorm, "child modules"),
        (ThreeParameters, "3 parameters"),
        (Final, "cannot be derived from: final"),
        (Crashing, "KeyError: 'no such thing'"),
        (lambda: nn.BatchNorm1d(WIDTH), "buffers"),
        (lambda: nn.GroupNorm(4, WIDTH), NEITHER),
        (lambda: nn.GroupNorm(1, WIDTH), "raises|something else"),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_norm_is_left(cls, reason):
    module = cls()
    original = type(module)
    report = bigmodel.convert(module)
    assert report.replaced == [] and type(module) is original
    assert [(entry.name, entry.cls) for entry in report.left] == [("", original.__name__)]
    assert re.search(reason, report.left[0].reason), report.left[0].reason


@pytest.mark.parametrize("flag", ["norms", "attention", "verbose"])
def test_a_flag_that_is_no_bool_is_refused(flag):
    with pytest.raises(TypeError, match=rf"^convert: {flag} must be a bool, got str\.$"):
        bigmodel.convert(nn.LayerNorm(4), **{flag: "no"})
