"""Bad input to the multi-tensor ops: one sentence that names the op and the argument, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from bigmodel.ops import TableCache, adagrad_, adam_, ema_, grad_clip, grad_scale_, grad_total, sgd_

P, G = [torch.ones(4), torch.ones(3, 3)], [torch.ones(4), torch.ones(3, 3)]
S, N = [torch.ones(4), torch.ones(3, 3)], [torch.ones(()), torch.ones(())]
META = [G[0], torch.ones(3, 3, device="meta")]
TOTAL = torch.ones((), dtype=torch.float64)
HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled": True}


def sgd(params=P, grads=G, buffers=(), begun=(), **options):
    sgd_(params, grads, buffers, begun, **{"lr": 0.1, **options})


def adam(params=P, grads=G, first=S, second=S, steps=N, **options):
    adam_(params, grads, first, second, steps, **{**HYPER, **options})


def adagrad(params=P, grads=G, sums=S, steps=N, **options):
    adagrad_(params, grads, sums, steps, **{"lr": 0.1, **options})


UPDATES = {"sgd_": sgd, "adam_": adam, "adagrad_": adagrad}
CASES = {
    "no factor": (lambda: grad_scale_(G, None), "grad_scale_: factor must be a torch.Tensor, got NoneType"),
    "a number as factor": (lambda: grad_scale_(G, 0.5), "grad_scale_: factor must be a torch.Tensor, got float"),
    "scaling on meta": (lambda: grad_scale_(META, TOTAL), "grad_scale_: grads[1] is on device 'meta'"),
    "total of a tensor": (lambda: grad_total(G[0]), "grad_total: grads must be a list or tuple of tensors, got Tensor"),
    "total of None": (lambda: grad_total(None), "grad_total: grads must be a list or tuple of tensors, got NoneType"),
    "total of numbers": (lambda: grad_total([1, 2]), "grad_total: grads[0] must be a torch.Tensor, got int"),
    "norm_type": (lambda: grad_total(G, []), "grad_total: norm_type is []; supported are"),
    "clip of a number": (lambda: grad_clip(1.0, 1.0), "grad_clip: total must be a torch.Tensor, got float"),
    "clip by text": (lambda: grad_clip(TOTAL, "x"), "grad_clip: max_norm must be a number, got str"),
    "clip below 0": (lambda: grad_clip(TOTAL, -1.0), "grad_clip: max_norm is -1.0; it must be at least 0"),
    "clip at NaN": (lambda: grad_clip(TOTAL, float("nan")), "grad_clip: max_norm is nan; it must be at least 0"),
    "clip's flag": (lambda: grad_clip(TOTAL, 1.0, skip_nonfinite="x"), "skip_nonfinite must be a bool, got str"),
    "clip's scale": (lambda: grad_clip(TOTAL, 1.0, grad_scale=2.0), "grad_scale must be a torch.Tensor or None"),
    "clip's dtype": (lambda: grad_clip(TOTAL, 1.0, norm_dtype="x"), "grad_clip: norm_dtype is x; supported are"),
    "ema of a generator": (lambda: ema_((p for p in P), G, 0.5), "ema_: averages must be a list or tuple of tensors"),
    "ema of text": (lambda: ema_("ab", G, 0.5), "ema_: averages must be a list or tuple of tensors, got str"),
    "ema with meta": (lambda: ema_(P, META, 0.5), "ema_: values[1] is on device 'meta', but averages[0] is on 'cpu'"),
    "ema on meta": (lambda: ema_(P, META[1:], 0.5), "ema_: values[0] is on device 'meta'"),
    "ema's decay": (lambda: ema_(P, G, "x"), "ema_: decay must be a number, got str"),
    "ema's cache": (lambda: ema_(P, G, 0.5, cache={}), "ema_: cache must be a bigmodel.ops.TableCache or None"),
    "averages beside no values": (lambda: ema_([], G, 0.5), "ema_: values has 2 tensors, but averages has 0"),
    "adam's seed": (lambda: adam(seed=1.5), "adam_: seed must be an int or None, got float"),
    "adam's decoupled": (lambda: adam(decoupled="x"), "adam_: decoupled must be a bool, got str"),
    "adam's moments on meta": (lambda: adam(first=META), "adam_: exp_avgs[1] is on device 'meta'"),
    "adam's optional list": (lambda: adam(masters=None), "adam_: masters must be a list or tuple of tensors"),
    "sgd's nesterov": (lambda: sgd(nesterov="x"), "sgd_: nesterov must be a bool, got str"),
    "sgd's buffers": (lambda: sgd(buffers=None), "sgd_: momentum_buffers must be a list or tuple of tensors, got None"),
    "a rate of two": (lambda: sgd(lr=torch.ones(2)), "sgd_: lr has shape (2,); it must be a number or one element"),
}
for op, update in UPDATES.items():
    CASES |= {
        f"{op} of {name}": (lambda update=update, bad=bad: update(bad), f"{op}: params{words}")
        for name, bad, words in (
            ("a tensor", P[1], " must be a list or tuple of tensors, got Tensor"),
            ("None", None, " must be a list or tuple of tensors, got NoneType"),
            ("a generator", (p for p in P), " must be a list or tuple of tensors, got generator"),
            ("numbers", [1, 2], "[0] must be a torch.Tensor, got int"),
        )
    }
    CASES |= {
        f"{op}, {name}": (lambda update=update, o=options: update(**o), f"{op}: {words}")
        for name, options, words in (
            ("scale", {"grad_scale": 2.0}, "grad_scale must be a torch.Tensor or None, got float"),
            ("factor", {"grad_factor": 1.0}, "grad_factor must be a torch.Tensor or None, got float"),
            ("found_inf", {"found_inf": 0.0}, "found_inf must be a torch.Tensor or None, got float"),
            ("maximize", {"maximize": "x"}, "maximize must be a bool, got str"),
            ("lr", {"lr": None}, "lr must be a number, got NoneType"),
            ("all gradients on meta", {"params": P[1:], "grads": META[1:]}, "grads[0] is on device 'meta'"),
            ("one gradient on meta", {"grads": META}, "grads[1] is on device 'meta', but params[0] is on 'cpu'"),
            ("no gradient", {"grads": [G[0], None]}, "grads[1] must be a torch.Tensor, got NoneType"),
            ("no parameters", {"params": []}, "grads has 2 tensors, but params has 0"),
        )
    }


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_names_the_op_and_the_argument(case):
    call, words = CASES[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert words in message and message.endswith(".") and "\n" not in message
    assert all((t == 1).all() for t in (*P, *G, *S, *N))


@pytest.mark.parametrize("name", UPDATES)
def test_what_is_traced_is_checked_too(name):
    meta = [t.to("meta") for t in P]
    state = {} if name == "sgd_" else {"steps": [t.to("meta") for t in N]}
    state |= {"sums": meta} if name == "adagrad_" else {"first": meta, "second": meta} if name == "adam_" else {}
    UPDATES[name](meta, meta, **state)
    with pytest.raises(ValueError, match=f"{name}: grads.0. is on device 'cpu', but params.0. is on 'meta'"):
        UPDATES[name](meta, G, **state)
    with pytest.raises(TypeError, match=f"{name}: found_inf must be a torch.Tensor or None, got float"):
        UPDATES[name](meta, meta, **state, found_inf=1.0)


def test_what_requires_grad_is_not_written_in_grad_mode():
    """As torch's own in-place ops have it for leaves; a graph would not know of what is written to others."""
    for leaf in (torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True) * 1):
        with pytest.raises(ValueError, match=r"sgd_: params\[0\] requires grad and would be written"):
            sgd_([leaf], [torch.ones(4)], lr=0.1)
        with pytest.raises(ValueError, match=r"adam_: exp_avgs\[0\] requires grad"):
            adam_([torch.ones(4)], [torch.ones(4)], [leaf], S[:1], N[:1], **HYPER)
        with pytest.raises(ValueError, match=r"grad_scale_: grads\[0\] requires grad"):
            grad_scale_([leaf], TOTAL)
        assert (leaf == 1).all()
        with torch.no_grad():
            sgd_([leaf], [torch.ones(4)], lr=0.5)
        assert (leaf == 0.5).all()
    averages, values = [torch.zeros(4)], [torch.ones(4, requires_grad=True)]
    ema_(averages, values, 0.5)
    assert (averages[0] == 0.5).all() and not averages[0].requires_grad and not grad_total(values).requires_grad


@pytest.mark.parametrize("first, second", [("sgd_", "adagrad_"), ("sgd_", "adam_"), ("adam_", "sgd_")])
def test_one_cache_may_serve_several_ops(first, second):
    """A table has the columns of its op."""

    def fresh(values):
        return [value.clone() for value in values]

    def run(cache):
        params, states, steps = fresh(P), fresh(S), fresh(N)
        state = {"adagrad_": {"sums": states, "steps": steps}, "sgd_": {},
                 "adam_": {"first": states, "second": fresh(S), "steps": steps}}  # fmt: skip
        for name in (first, second, first):
            UPDATES[name](params, G, **state[name], cache=cache)
        return params

    assert all(torch.equal(a, b) for a, b in zip(run(TableCache()), run(None), strict=True))


def test_one_cache_may_serve_the_norm_and_the_scaling():
    cache, grads = TableCache(), [torch.ones(4, 4)[:, ::2]]
    assert grad_total(grads, cache=cache) == 8
    grads = [torch.ones(4)]
    assert grad_total(grads, cache=cache) == 4
    grad_scale_(grads, TOTAL * 2, cache=cache)
    assert (grads[0] == 2).all() and grad_total(grads, cache=cache) == 16


def test_the_registered_clip_checks_what_it_is_given():
    with pytest.raises(ValueError, match="grad_clip: total is torch.float32 with 1 elements"):
        torch.ops.bigmodel.grad_clip(torch.ones(()), None, None, None, 1.0, 2.0, False, torch.float32)
    with pytest.raises(ValueError, match="grad_clip: skipped is torch.float32 with 0 elements"):
        torch.ops.bigmodel.grad_clip(TOTAL, None, None, torch.ones(0), 1.0, 2.0, False, torch.float32)
