"""The plainest look-alike of a norm, for the tests of bigmodel.convert to change."""

import torch
from torch import nn

WIDTH = 32


class Norm(nn.Module):
    """A weight, an eps and the root mean square norm."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))
        self.eps = eps

    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.normed(x) * self.weight
