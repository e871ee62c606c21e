"""What the tests of the normalisation ops share: the definition, stock's op, and the comparison of all three."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import FLOATS, assert_accurate

import bigmodel

LOW = [torch.bfloat16, torch.float16]
# input, weight, out
MIXES = [
    *((d, d, d) for d in FLOATS),
    *((low, torch.float32, low) for low in LOW),
    *((low, torch.float32, torch.float32) for low in LOW),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.float64, torch.bfloat16),
]
RESIDUAL_MIXES = [  # input, residual, residual_dtype
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float64, torch.float64, None),
    (torch.float16, torch.float64, None),
]


def exact_norm(centred, x, shape, weight, bias, eps, offset=0.0):
    """The definition, in the dtype it is given."""
    axes = tuple(range(-len(shape), 0))
    if centred:
        x = x - x.mean(axes, keepdim=True)
    out = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    if weight is not None:
        out = out * (weight + offset)
    return out if bias is None else out + bias


def stock_norm(centred, x, shape, weight, bias, eps, offset=0.0):
    """torch's own op in float32 arithmetic (float64 for float64), for any mix of dtypes."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    x, weight, bias = (None if t is None else t.to(wide) for t in (x, weight, bias))
    weight = weight + offset if weight is not None else None
    return F.layer_norm(x, shape, weight, bias, eps) if centred else F.rms_norm(x, shape, weight, eps)


def our_norm(centred, x, shape, weight, bias, eps, offset=0.0, **options):
    if centred:
        return bigmodel.layer_norm(x, shape, weight, bias, eps, weight_offset=offset, **options)
    return bigmodel.rms_norm(x, shape, weight, eps, weight_offset=offset, **options)


def leaves(*tensors):
    """The same memory, strides and address included, which a clone would not keep."""
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def compare(centred, x, shape, weight, bias, eps=1e-5, offset=0.0, out_dtype=None, strict=False):
    """Our values and gradients against float64, with stock as the yardstick."""
    out_dtype = out_dtype or x.dtype
    grad = torch.randn(x.shape, device=x.device, dtype=torch.float64).to(out_dtype)
    doubles = leaves(*(None if t is None else t.double() for t in (x, weight, bias)))
    exact = exact_norm(centred, doubles[0], shape, *doubles[1:], eps, offset)
    stocks, ours = leaves(x, weight, bias), leaves(x, weight, bias)
    stock = stock_norm(centred, stocks[0], shape, *stocks[1:], eps, offset).to(out_dtype)
    out = our_norm(centred, ours[0], shape, *ours[1:], eps, offset, out_dtype=out_dtype)
    assert out.dtype is out_dtype and out.is_contiguous()
    assert_accurate(out, stock, exact.detach(), "out", strict=strict)
    for tensor, gradient in ((exact, grad.double()), (stock, grad), (out, grad)):
        tensor.backward(gradient)
    for name, our, stock_leaf, double in zip(("input", "weight", "bias"), ours, stocks, doubles, strict=True):
        if double is not None:
            assert our.grad.dtype is our.dtype
            assert_accurate(our.grad, stock_leaf.grad, double.grad, f"grad of {name}", strict=strict)


def make(rows, cols, dtype=torch.float32, weight_dtype=None, device="cpu", bias=True):
    shape = (*rows, cols) if isinstance(rows, tuple) else (rows, cols)
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    weight = (torch.randn(cols, dtype=torch.float64) + 0.5).to(device, weight_dtype or dtype)
    return x, weight, torch.randn(cols, dtype=torch.float64).to(device, weight_dtype or dtype) if bias else None


def arguments(device="cpu", dtype=torch.float32, rows=6, cols=24, grad=True):
    return [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for shape in ((rows, cols), (cols,), (cols,))
    ]


def strided_inputs(device="cpu", dtype=torch.float32):
    """(name, tensor): views of what is on its device already, since to move or to convert a view packs it."""
    base, flat = (torch.randn(size).to(device, dtype) for size in ((6, 10, 130), (6 * 130 + 1,)))
    views = {
        "transposed": base.transpose(0, 1),
        "row stride": base[:, :, :96],
        "column step": base[:, :, ::2],
        "cut rows": base[:, 2:9, :],
        "expanded": base[:1].expand(6, 10, 130),
        "last transposed": base.transpose(1, 2),
        "offset one element": flat[1:].view(6, 130),
        "one row": base[0, 1],
    }
    for name, x in views.items():
        assert not x.is_contiguous() or x.data_ptr() % 16, name
        yield name, x
