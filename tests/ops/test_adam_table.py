"""Tables of the multi-tensor ops: what makes a new one, what is refused, and the way through torch's dispatcher."""

from __future__ import annotations

import math

import cuda_host
import pytest
import torch
from large import LARGE, need_gib
from test_adam import HYPER, Group, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from bigmodel import _native, _registry
from bigmodel.ops import _table, adagrad_, adam_, ema_, grad_clip, grad_scale_, grad_total, sgd_
from bigmodel.ops._table import TableCache

SIZES = [(40, 40), (300,)]
MOVES = {
    "params": lambda t: t.clone(),
    "grads": lambda t: t.clone(),
    "m": lambda t: t.clone(),
    "v": lambda t: t.clone(),
    "steps": lambda t: t.double(),
    "largest": lambda t: t.to(torch.bfloat16),
    "emas": lambda t: t.clone(),
}


@pytest.fixture(params=["dlpack", "attributes"])
def described(request, monkeypatch):
    """Both ways of reading tensors: torch before 2.10 has no table of C functions."""
    if request.param == "attributes":
        monkeypatch.setattr(_table, "_DLPACK", None)
    elif _table._DLPACK is None:
        pytest.skip("this torch has no DLPack table of C functions")


def test_codes_lie_flat_or_in_their_parameters_order():
    group = Group(sizes=[(4, 8, 3, 3)], state=torch.uint8)
    group.m, group.v = [group.m[0].flatten()], [group.v[0].flatten()]
    group.step()
    for tensors in (group.params, group.grads):
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    group.step()
    group.m[0] = group.m[0].view(4, 8, 3, 3)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has strides"):
        group.step()


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("whole", [True, False], ids=["new object", "data"])
def test_whatever_moves_makes_a_new_table(described, name, whole):
    """The old memory is filled with NaN: a stale address would be seen."""
    group, cache = Group(sizes=SIZES, amsgrad=True, ema=True), TableCache()
    group.step(cache=cache)
    other = group.copy()
    tensors = getattr(group, name)
    old = tensors[0]
    moved = MOVES[name](old)
    if whole:
        tensors[0] = moved
        old.fill_(math.nan)
    else:
        kept = old.detach()
        old.data = moved
        kept.fill_(math.nan)
    group.step(cache=cache)
    other.step()
    rough = 2e-2 if name == "largest" else 0
    for key, mine in group.written().items():
        for a, b in zip(mine, getattr(other, key), strict=True):
            torch.testing.assert_close(a, b, check_dtype=False, rtol=rough, atol=rough)


@pytest.mark.parametrize("change", ["dtype", "strides", "size"])
def test_another_gradient_at_the_same_address(described, change):
    """What a freed gradient's memory may become: the address alone says nothing."""
    memory, beyond = torch.randn(1600), slice(20 if change == "size" else 1600, None)
    group, cache = Group(sizes=[(40, 40)]), TableCache()
    group.grads = [memory.view(40, 40)]
    group.step(cache=cache)
    whole = group.params[0]
    if change == "dtype":
        group.grads = [memory.view(torch.bfloat16)[:1600].view(40, 40).nan_to_num_(0, 0, 0)]
    elif change == "strides":
        group.grads = [memory.view(40, 40).t()]
    else:
        group.params, group.m, group.v = ([t[0][0][:20]] for t in (group.params, group.m, group.v))
        group.grads = [memory.view(40, 40)[0][:20]]
    assert group.grads[0].data_ptr() == memory.data_ptr()
    other, before = group.copy(), whole.clone()
    group.step(cache=cache)
    other.step()
    assert_same_bits(group, other)
    assert torch.equal(whole.flatten()[beyond], before.flatten()[beyond])


def test_copies_of_gradients_end_with_their_call(described):
    group, cache = Group(sizes=[(40, 40)]), TableCache()
    group.step(cache=cache)
    group.grads = [torch.randn(40, 40).t()]
    group.step(cache=cache)
    assert cache._table is None, "a table that is kept keeps its copies: 4 bytes for each parameter"


def test_nothing_moved_keeps_the_table(described):
    group, cache = Group(sizes=SIZES, master=True, dtype=torch.bfloat16), TableCache()
    group.step(cache=cache)
    table = cache._table
    group.step(cache=cache)
    assert cache._table is table


def test_a_captured_step_has_scratch_of_its_own(monkeypatch):
    """One from before the capture would be freed with its table, and replays would write to another tensor's memory."""
    group, cache = Group(sizes=SIZES), TableCache()
    with cuda_host.as_cpu():
        group.step(cache=cache)
        first = cache._table.scratch
        group.step(cache=cache)
        assert cache._table.scratch is first
        monkeypatch.setattr(_registry, "capturing", lambda device: True)
        group.step(cache=cache)
    assert cache._table.scratch.data_ptr() != first.data_ptr()


def test_versions_of_all_that_is_written(device):
    group = Group(sizes=SIZES, device=device, amsgrad=True, ema=True, master=True, dtype=torch.bfloat16)
    before = {name: [t._version for t in tensors] for name, tensors in group.written().items()}
    group.step()
    for name, tensors in group.written().items():
        assert all(t._version > v for t, v in zip(tensors, before[name], strict=True)), name
    weight = torch.ones(3, requires_grad=True)
    out = (weight * weight).sum()
    with torch.no_grad():
        ema_([weight], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- what is refused --------------------------------------------------------------------------------------------------
def call(**changes):
    lists = {name: [torch.zeros(4, 4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    adam_(**lists | {"steps": [torch.zeros(())], "decoupled": True} | HYPER | changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"grads": []}, ValueError, None),
        ({"grads": [torch.zeros(4, 4)] * 2}, ValueError, "grads has 2 tensors, but params has 1"),
        ({"grads": [torch.zeros(16)]}, ValueError, r"grads\[0\] has shape \(16,\), but params\[0\] is \(4, 4\)"),
        ({"grads": [torch.zeros(4, 4).to_sparse()]}, TypeError, r"grads\[0\] must be a dense torch.strided tensor"),
        ({"grads": [torch.zeros(4, 4, dtype=torch.int32)]}, TypeError, r"grads\[0\] has dtype torch.int32"),
        ({"params": [torch.zeros(1, 4).expand(4, 4)]}, ValueError, r"params\[0\] has overlapping or scattered"),
        ({"exp_avgs": [torch.zeros(4, 4).t()]}, ValueError, r"exp_avgs\[0\] has strides \(1, 4\)"),
        ({"exp_avgs": [torch.zeros(4, 4, dtype=torch.uint8)]}, ValueError, r"exp_avgs\[0\] has 8-bit codes, but"),
        ({"masters": [torch.zeros(4, 4).double()]}, TypeError, r"masters\[0\] has dtype torch.float64"),
        ({"steps": [torch.zeros(2)]}, ValueError, r"steps\[0\] has 2 elements"),
        ({"exp_avg_sqs": [torch.zeros(4, 4, device="meta")]}, ValueError, r"exp_avg_sqs\[0\] is on device 'meta'"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"lr": math.nan}, ValueError, "lr is nan; it must be finite"),
        ({"found_inf": torch.zeros(2)}, ValueError, "found_inf is torch.float32 with 2 elements"),
    ],
)  # fmt: skip
def test_errors(changes, error, words):
    words = words or "grads has 0 tensors, but params has 1"
    with pytest.raises(error, match="^adam_: " + words):
        call(**changes)


def test_every_tensor_that_is_not_optional_must_come():
    with pytest.raises(ValueError, match="adam_: exp_avgs has 0 tensors, but params has 1"):
        call(exp_avgs=[])
    with pytest.raises(ValueError, match="adam_: steps has 0 tensors, but params has 1"):
        call(steps=[])
    with pytest.raises(TypeError, match=r"adam_: grads\[0\] must be a torch.Tensor, got NoneType"):
        call(grads=[None])


# --- through the dispatcher -------------------------------------------------------------------------------------------
def arguments(found_inf=None):
    group = Group(sizes=SIZES, amsgrad=True, ema=True)
    empty = [torch.empty(0) for _ in SIZES]
    lists = (*group.lists[:6], empty, group.emas, empty, empty)
    return (*lists, None, None, None, found_inf, *HYPER.values(), True, False, 0.9, None)


def test_opcheck():
    ops, x = torch.ops.bigmodel, [torch.randn(5), torch.randn(3, 2)]
    one = torch.ones(())
    torch.library.opcheck(ops.adam_.default, arguments())
    torch.library.opcheck(ops.ema_.default, ([t.clone() for t in x], x, 0.5))
    torch.library.opcheck(ops.grad_total.default, (x, 2.0))
    torch.library.opcheck(ops.grad_scale_.default, ([t.clone() for t in x], one.double() * 0.5))
    torch.library.opcheck(ops.grad_clip.default, (one.double(), None, None, one.clone(), 1.0, 2.0, True, torch.float32))
    sgd = ([t.clone() for t in x], x, [t.clone() for t in x], [])
    torch.library.opcheck(ops.sgd_.default, (*sgd, None, None, None, None, 0.1, 0.9, 0.0, 0.01, True, False))
    adagrad = ([t.clone() for t in x], x, [t.abs() for t in x], [one.clone() for _ in x])
    torch.library.opcheck(ops.adagrad_.default, (*adagrad, None, None, None, None, 0.1, 0.0, 0.01, 1e-8, False))


def test_the_registered_op_does_what_the_short_way_does():
    group, values = Group(sizes=SIZES, amsgrad=True, ema=True), arguments()
    torch.ops.bigmodel.adam_(*values)
    group.step()
    for ours, theirs in zip(group.lists[:6], values[:6], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fake_tensors_reach_no_kernel(monkeypatch):
    def refuse(*args):
        raise AssertionError("native code was called")

    for name in ("adam", "sgd", "adagrad", "ema", "grad_total", "grad_scale", "grad_clip"):
        monkeypatch.setattr(_native.load().cpu, name, refuse)
    for device in ("cpu", "meta"):
        with FakeTensorMode():
            x, steps = [torch.empty(4, device=device)], [torch.empty((), device=device)]
            adam_(x, x, x, x, steps, **HYPER, decoupled=True)
            sgd_(x, x, lr=0.1)
            adagrad_(x, x, x, steps, lr=0.1)
            ema_(x, x, 0.5)
            total = grad_total(x)
            grad_scale_(x, grad_clip(total, 1.0).factor)
            assert total.dtype is torch.float64 and total.shape == ()


def test_compiled_whole():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, grads, m, v, steps):
        adam_(params, grads, m, v, steps, **HYPER, decoupled=True)

    group = Group(sizes=SIZES)
    other = group.copy()
    step(*group.lists[:5])
    other.step()
    assert_same_bits(group, other)


# --- large ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@LARGE
def test_more_than_2_to_31_elements(device):
    """What lies beyond 2^31 has the bits that it has alone; all before it is zero and stays so."""
    need_gib(device, 18)
    small = [torch.rand(30_000, device=device).to(torch.bfloat16) for _ in range(4)]
    large = [torch.zeros(2**31 + 10_000, dtype=torch.bfloat16, device=device) for _ in small]
    for whole, part in zip(large, small, strict=True):
        whole[-30_000:] = part
    for tensors in (large, small):
        adam_(*([t] for t in tensors), [torch.ones((), device=device)], **HYPER, decoupled=True)
    for whole, part in zip(large, small, strict=True):
        assert torch.equal(whole[-30_000:], part) and not whole[:-30_000].any()
