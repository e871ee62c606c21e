"""What the softmax tests compare with: the formula in one dtype, and calls drawn from every combination of options."""

from __future__ import annotations

import torch
from conftest import ATOL, assert_accurate
from hypothesis import strategies as st

import bigmodel
from bigmodel.ops import _softmax_reference

FLOAT_MASKS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class _Rounded(torch.autograd.Function):
    """softmax as torch's own op of a narrower dtype does it: y is rounded, and that is what backward sees."""

    @staticmethod
    def forward(ctx, z, dtype):
        if z.dtype is torch.float64:  # sum() adds pairwise; softmax's own sum of 150,001 was off by 8e-15 on aarch64
            y = torch.exp(z - z.amax(-1, keepdim=True))
            y = (y / y.sum(-1, keepdim=True)).to(dtype).to(z.dtype)
        else:
            y = torch.softmax(z, -1).to(dtype).to(z.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True)), None


def plain(scores, *, scale=1.0, mask=None, causal=False, window=None, alibi_slopes=None, softcap=None, sinks=None,
          kept=None, dropout_p=0.0, rounded=None):  # fmt: skip
    """The formula of attention_softmax, step by step in scores' dtype; `kept` says what dropout leaves."""
    queries, keys = scores.shape[-2:]
    position = torch.arange(queries, device=scores.device)[:, None] + keys - queries
    key = torch.arange(keys, device=scores.device)[None]
    z = scores * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    live = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype is torch.bool:
        live = live & mask
    elif mask is not None:
        z, live = z + mask, live & (mask != -torch.inf)
    if alibi_slopes is not None:
        z = z - alibi_slopes[:, None, None] * (position - key).abs()
    left, right = window or (None, None)
    if causal:
        live = live & (key <= position)
    if left is not None:
        live = live & (key >= position - left)
    if right is not None:
        live = live & (key <= position + right)
    z = torch.where(live, z, -torch.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        z = torch.cat([z, column], -1)
    else:  # a column that changes nothing, so that a row without live keys is not 0 / 0
        dead = ~live.any(-1, keepdim=True)
        z = torch.cat([z, torch.where(dead, 0.0, -torch.inf).to(z.dtype)], -1)
    y = torch.softmax(z, -1) if rounded is None else _Rounded.apply(z, rounded)
    y = y[..., :-1]
    return y if kept is None else y * kept / (1 - dropout_p)


def normal(*shape, dtype=torch.float32, device="cpu", spread=3.0):
    return (spread * torch.randn(shape, dtype=torch.float64)).to(device, dtype)


def leaves(*tensors):
    """The same memory, strides and address included, which a clone would not keep."""
    return [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def compare(scores, *, mask=None, alibi_slopes=None, sinks=None, dropout_p=0.0, out_dtype=None, grad=None, **options):
    """Our values and gradients against the formula in float64, the same in float32 being the yardstick."""
    out_dtype = out_dtype or scores.dtype
    coarsest = max((scores.dtype, out_dtype), key=ATOL.get)
    if grad is None:
        grad = torch.randn(scores.shape, dtype=torch.float64, device=scores.device)
    grad = grad.to(out_dtype)
    kept = None
    if dropout_p:
        start = int(torch.randint(2**31, ()))  # of the generators of all devices: the op draws from its own
        torch.manual_seed(start)
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=scores.device)
        kept = _softmax_reference.kept(seed, scores.shape, dropout_p)

    def formula(dtype, rounded):
        wide = [None if t is None else t if t.dtype is torch.bool else t.to(dtype) for t in (scores, mask, sinks)]
        own = leaves(*wide)
        slopes = None if alibi_slopes is None else alibi_slopes.to(dtype)
        more = {"kept": kept, "dropout_p": dropout_p, "rounded": rounded, **options}
        out = plain(own[0], mask=own[1], sinks=own[2], alibi_slopes=slopes, **more)
        out.backward(grad.to(dtype))
        return out.detach(), [None if t is None or t.grad is None else t.grad for t in own]

    exact, exact_grads = formula(torch.float64, torch.float64)
    wide = torch.float64 if scores.dtype is torch.float64 else torch.float32
    stock, stock_grads = formula(wide, out_dtype)
    own = leaves(scores, mask, sinks)
    options.update(alibi_slopes=alibi_slopes, dropout_p=dropout_p)
    if dropout_p:
        torch.manual_seed(start)
    out = bigmodel.attention_softmax(own[0], mask=own[1], sinks=own[2], out_dtype=out_dtype, **options)
    assert out.dtype is out_dtype and out.is_contiguous()
    out.backward(grad)
    assert_accurate(out, stock.to(out_dtype), exact, "out", dtype=coarsest)
    for name, ours, other, double in zip(("scores", "mask", "sinks"), own, stock_grads, exact_grads, strict=True):
        if double is None:
            continue
        assert ours.grad.dtype is ours.dtype and ours.grad.shape == ours.shape
        worst = max((coarsest, ours.dtype), key=ATOL.get)
        # Gradients are differences of y * grad, which may cancel to nothing: two roundings of those are granted.
        terms = float(grad.abs().max()) * (1 if name != "scores" else abs(options.get("scale", 1))) / (1 - dropout_p)
        error, other_error = (ours.grad.double() - double).abs().max(), (other.to(ours.dtype) - double).abs().max()
        assert torch.isfinite(ours.grad).all(), f"grad of {name}: not finite"
        bound = 2 * other_error + ATOL[worst] * double.abs().max() + 2 * torch.finfo(worst).eps * terms
        assert error <= bound, f"grad of {name}: error {error:.3g} over {bound:.3g}"
    return out


@st.composite
def calls(draw, max_keys=70):
    """(scores, options) over every combination of the options, shapes, broadcasts and layouts."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, max_keys))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pad, swap = draw(st.integers(0, 3)), draw(st.booleans())
    scores = (3 * normal(batch, heads, queries, keys + pad)).to(dtype)[..., :keys]
    if swap:
        scores = scores.transpose(0, 1).contiguous().transpose(0, 1)
    options = {"scale": draw(st.sampled_from([1.0, 0.125, -0.5]))}
    kind = draw(st.sampled_from(["none", "bool", "float", "rows"]))
    if kind != "none":
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, queries, keys)]
        shape = shape[draw(st.integers(0, 3)) :]
        mask = normal(*shape)
        if kind == "bool":
            mask = mask > -0.7
        else:
            mask = mask.to(draw(st.sampled_from(FLOAT_MASKS if dtype is torch.float64 else FLOAT_MASKS[:3])))
            mask = mask.masked_fill(mask < -1.5, -torch.inf) if kind == "float" else mask
        if draw(st.booleans()):
            mask = mask.mT.contiguous().mT if mask.dim() > 1 else torch.stack([mask, mask], -1)[..., 0]
        options["mask"] = mask
    options["causal"] = draw(st.booleans())
    sizes = st.one_of(st.none(), st.integers(0, max_keys))
    options["window"] = draw(st.one_of(st.none(), st.tuples(sizes, sizes)))
    options["alibi_slopes"] = draw(st.sampled_from([None, normal(heads).abs().float()]))
    options["softcap"] = draw(st.sampled_from([None, 2.0, 50.0]))
    options["sinks"] = draw(st.sampled_from([None, normal(heads).to(dtype)]))
    options["dropout_p"] = draw(st.sampled_from([0.0, 0.4]))
    options["out_dtype"] = draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]))
    return scores, options
