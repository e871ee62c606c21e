"""The normalisation ops inside torch: autograd, the dispatcher, compilation, and transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from norm_cases import arguments
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bigmodel.ops
from bigmodel import _native

EPS = 1e-5
FUNCTIONS = {
    "rms": lambda x, w, b: bigmodel.rms_norm(x, x.shape[-1], w, EPS),
    "layer": lambda x, w, b: bigmodel.layer_norm(x, x.shape[-1], w, b, EPS),
    "add_rms": lambda x, w, b: sum(bigmodel.add_rms_norm(x, x * 0.5, x.shape[-1], w, EPS)),
    "add_layer": lambda x, w, b: sum(bigmodel.add_layer_norm(x, x * 0.5, x.shape[-1], w, b, EPS)),
}
STOCK = {
    "rms": lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, EPS),
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
    "add_rms": lambda x, w, b: F.rms_norm(x * 1.5, x.shape[-1:], w, EPS) + x * 1.5,
    "add_layer": lambda x, w, b: F.layer_norm(x * 1.5, x.shape[-1:], w, b, EPS) + x * 1.5,
}


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


@pytest.fixture
def native_calls(monkeypatch):
    """Counts native calls, and fails any whose input or output pointer is 0."""
    calls = []
    table = _native.load().cpu

    def watched(name, function):
        def call(*args):
            calls.append(name)
            data = (args[0], args[4]) if name.endswith("forward") else (args[0], args[5], args[7])
            assert all(data), f"{name} was given a null pointer"
            return function(*args)

        return call

    for function in ("rms_norm_forward", "layer_norm_forward", "rms_norm_backward", "layer_norm_backward"):
        monkeypatch.setattr(table, function, watched(function, getattr(table, function)))
    return calls


# --- autograd ---------------------------------------------------------------------------------------------------------
def test_gradcheck(device, name):
    x, w, b = arguments(device, torch.float64, 3, 5)
    assert torch.autograd.gradcheck(FUNCTIONS[name], (x, w, b))
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], (x, w, b))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_gradcheck_of_the_options(device, memory_efficient):
    x, w, b = arguments(device, torch.float64, 3, 5)
    options = {"weight_offset": 1.0, "memory_efficient": memory_efficient}
    assert torch.autograd.gradcheck(lambda x, w: bigmodel.rms_norm(x, 5, w, EPS, **options), (x, w))
    assert torch.autograd.gradcheck(lambda *a: bigmodel.layer_norm(a[0], 5, *a[1:], EPS, **options), (x, w, b))


@pytest.mark.parametrize("way", ["shared norm", "weight is bias", "x depends on the weight", "residual"])
def test_gradients_with_a_graph_of_shared_arguments(device, way):
    """create_graph=True must not count a path through an argument twice."""
    x, w, b = arguments(device, torch.float64)

    def loss(functions):
        if way == "shared norm":
            out = functions["layer"](functions["layer"](x, w, b), w, b)
        elif way == "weight is bias":
            out = functions["layer"](x, w, w)
        elif way == "x depends on the weight":
            out = functions["rms"](x * w, w, b)
        else:
            out = functions["add_layer"](x * w, w, b)
        return out.cos().sum()

    ours = torch.autograd.grad(loss(FUNCTIONS), (x, w), create_graph=True)
    stock = torch.autograd.grad(loss(STOCK), (x, w), create_graph=True)
    assert_close(ours, stock)
    penalty, expected = (sum(grad.square().sum() for grad in grads) for grads in (ours, stock))
    assert_close(torch.autograd.grad(penalty, (x, w)), torch.autograd.grad(expected, (x, w)))


def test_forward_mode(device, name):
    x, w, b = arguments(device, torch.float64, 3, 5)
    assert torch.autograd.gradcheck(FUNCTIONS[name], (x, w, b), check_forward_ad=True, check_backward_ad=False)


def test_batched_gradients(device, name):
    x, w, b = arguments(device, rows=2, cols=5)
    jacobian = torch.autograd.functional.jacobian
    ours = jacobian(FUNCTIONS[name], (x, w, b), vectorize=True)
    assert_close(ours, jacobian(STOCK[name], (x, w, b), vectorize=True))


def test_hooks_that_unpack_other_strides(device):
    x, w, b = arguments(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.t().contiguous().t()):
        out = FUNCTIONS["layer"](x, w, b)
    out.square().sum().backward()
    ours, x.grad = x.grad, None
    STOCK["layer"](x, w, b).square().sum().backward()
    assert_close(ours, x.grad)


def test_the_sum_needs_a_gradient_only_as_stocks_does(device):
    x, w, _ = arguments(device)
    assert not bigmodel.add_rms_norm(x.detach(), x.detach(), 24, w)[1].requires_grad
    assert bigmodel.add_rms_norm(x.detach(), x.detach(), 24, w)[0].requires_grad
    assert bigmodel.add_rms_norm(x, x.detach(), 24, w)[1].requires_grad


def test_negated_views(device):
    x, w, _ = arguments(device, grad=False)
    assert_close(bigmodel.rms_norm(torch._neg_view(x), 24, w), bigmodel.rms_norm(-x, 24, w))


def test_second_derivative_of_memory_efficient_is_refused():
    x, w, _ = arguments()
    out = bigmodel.rms_norm(x, 24, w, memory_efficient=True)
    with pytest.raises(RuntimeError, match="memory_efficient=False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_gradients_that_are_wanted(device, needed):
    tensors = arguments(device)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(needed >> i & 1))
    bigmodel.layer_norm(tensors[0], 24, *tensors[1:]).square().sum().backward()
    ours = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    F.layer_norm(tensors[0], (24,), *tensors[1:]).square().sum().backward()
    for our, tensor in zip(ours, tensors, strict=True):
        assert (our is None) == (tensor.grad is None)
        if our is not None:
            assert_close(our, tensor.grad)


def test_changing_a_saved_tensor_raises(device):
    x, w, _ = arguments(device)
    x = x * 1
    out = bigmodel.rms_norm(x, 24, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_activation_checkpointing(device, name):
    x, w, b = arguments(device)
    FUNCTIONS[name](x, w, b).square().sum().backward()
    expected = [t.grad for t in (x, w)]
    x.grad = w.grad = b.grad = None
    checkpoint(FUNCTIONS[name], x, w, b, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_what_stock_does(device, dtype):
    x, w, b = arguments(device, dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert bigmodel.layer_norm(x, 24, w, b).dtype is F.layer_norm(x, (24,), w, b).dtype
        assert bigmodel.rms_norm(x, 24, w, EPS).dtype is F.rms_norm(x, (24,), w, EPS).dtype
        hidden = F.linear(x, torch.randn(24, 24, device=device, dtype=dtype))
        assert hidden.dtype is torch.bfloat16
        weight = w.float()
        assert bigmodel.layer_norm(hidden, 24, weight, b.float()).dtype is (
            F.layer_norm(hidden, (24,), weight, b.float()).dtype
        )


# --- the dispatcher ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, centred, residual, memory_efficient, dtype):
    x, w, b = arguments(device, dtype)
    w = w.detach().abs().add(0.5).requires_grad_()
    op = torch.ops.bigmodel.layer_norm_forward if centred else torch.ops.bigmodel.rms_norm_forward
    other = torch.randn_like(x).requires_grad_() if residual else None
    args = (x, other, w, b if centred else None, 1, EPS, 0.0, memory_efficient, dtype, dtype)
    torch.library.opcheck(op.default, args)
    out, summed, statistics = op(*args)
    backward = torch.ops.bigmodel.layer_norm_backward if centred else torch.ops.bigmodel.rms_norm_backward
    saved = out if memory_efficient else summed if residual else x
    tensors = (torch.randn_like(x), torch.randn_like(x) if residual else None, saved, statistics, w, args[3])
    tensors = tuple(None if t is None else t.detach() for t in tensors)
    torch.library.opcheck(
        backward.default, (*tensors, 1, 0.0, memory_efficient, dtype, torch.float32, True, centred),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_compile_fullgraph_forward_and_backward(device, name):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    def block(x, w, b):
        return FUNCTIONS[name](torch.sin(x), w, b).square()

    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    x, w, b = arguments(device)
    compiled(x, w, b).sum().backward()
    forward, backward = graphs
    assert "norm_forward" in forward and "norm_backward" in backward, "the compiled graph must hold the ops"
    grads = [t.grad for t in (x, w, b)]
    x.grad = w.grad = b.grad = None
    block(x, w, b).sum().backward()
    assert_close(grads, [t.grad for t in (x, w, b)])
    with torch.no_grad():
        assert_close(compiled(x, w, b), block(x, w, b))


def test_compile_with_inductor_and_dynamic_shapes(device):
    compiled = torch.compile(lambda x, w: bigmodel.rms_norm(torch.sin(x), 24, w, EPS) * 2, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        x, w, _ = arguments(device, rows=rows)
        out = compiled(x, w)
        out.sum().backward()
        grad, x.grad = x.grad, None
        expected = F.rms_norm(torch.sin(x), (24,), w, EPS) * 2
        expected.sum().backward()
        assert_close(out, expected), assert_close(grad, x.grad)


def test_symbolic_shapes():
    graph = make_fx(lambda x: bigmodel.rms_norm(x, x.shape[-1], None, EPS), tracing_mode="symbolic")(torch.randn(3, 8))
    x = torch.randn(5, 12)
    assert_close(graph(x), bigmodel.rms_norm(x, 12, None, EPS))


def test_the_registered_op_checks_what_it_is_given():
    with pytest.raises(ValueError, match="rms_norm_forward: weight has shape"):
        torch.ops.bigmodel.rms_norm_forward(
            torch.randn(4, 8), None, torch.ones(2), None, 1, EPS, 0.0, False, torch.float32, torch.float32
        )


def test_export(device):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bigmodel.nn.LayerNorm(24, device=device)

        def forward(self, x):
            return self.norm(x).relu()

    block, x = Block(), torch.randn(4, 24, device=device)
    program = torch.export.export(block, (x,), strict=False)
    assert "bigmodel.layer_norm_forward" in str(program.graph)
    assert_close(program.module()(x), block(x))


def test_fake_tensors_reach_no_native_code(name, native_calls):
    with FakeTensorMode():
        x, w, b = arguments()
        out = FUNCTIONS[name](x, w, b)
        out.sum().backward()
        assert out.shape == x.shape and x.grad.shape == x.shape and w.grad.shape == w.shape
    assert not native_calls


def test_meta_tensors_reach_no_native_code(name, native_calls):
    x, w, b = arguments("meta")
    out = FUNCTIONS[name](x, w, b)
    out.sum().backward()
    assert out.is_meta and x.grad.is_meta and not native_calls


def test_make_fx_records_the_op(name, native_calls):
    x, w, b = arguments(grad=False)
    graph = make_fx(FUNCTIONS[name])(x, w, b)
    assert any("bigmodel" in str(node.target) for node in graph.graph.nodes)
    y, v, c = arguments(grad=False)
    assert_close(graph(y, v, c), FUNCTIONS[name](y, v, c))


def test_make_fx_with_fake_tensors(name, native_calls):
    x, w, b = arguments(grad=False)
    graph = make_fx(FUNCTIONS[name], tracing_mode="fake")(x, w, b)
    assert not native_calls
    assert_close(graph(x, w, b), FUNCTIONS[name](x, w, b))


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, 0)], ids=str)
def test_vmap(device, name, in_dims, native_calls):
    x, w, b = arguments(device, grad=False)
    batched = [
        t if dim is None else torch.stack([t * (i + 1) for i in range(3)], dim)
        for t, dim in zip((x, w, b), in_dims, strict=True)
    ]
    ours = torch.vmap(FUNCTIONS[name], in_dims)(*batched)
    stock = torch.vmap(STOCK[name], in_dims)(*batched)
    assert_close(ours, stock)


def test_the_sum_is_exact_inside_transforms():
    x, r = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    call = lambda x, r: bigmodel.add_rms_norm(x, r, 8, residual_dtype=torch.float32)[1]  # noqa: E731
    assert torch.equal(torch.vmap(call)(x, r), call(x, r))


def test_functional_gradients(device, name, native_calls):
    x, w, b = arguments(device, grad=False)
    ours = torch.func.grad(lambda *a: FUNCTIONS[name](*a).square().sum(), (0, 1))(x, w, b)
    stock = torch.func.grad(lambda *a: STOCK[name](*a).square().sum(), (0, 1))(x, w, b)
    assert_close(ours, stock)


def test_gradients_per_sample(device, name, native_calls):
    x, w, b = arguments(device, grad=False)

    def per_sample(functions):
        loss = lambda w, x: functions[name](x[None], w, b).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss), (None, 0))(w, x)

    assert_close(per_sample(FUNCTIONS), per_sample(STOCK))


def test_torch_function_subclasses_are_not_bypassed(native_calls):
    class Tagged(torch.Tensor):
        pass

    x, w, _ = arguments(grad=False)
    out = bigmodel.rms_norm(x.as_subclass(Tagged), 24, w)
    assert_close(torch.Tensor(out), bigmodel.rms_norm(x, 24, w))
