"""The softmax ops inside torch: autograd, the dispatcher, compilation, transforms, distribution, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from functorch.compile import make_boxed_func
from softmax_cases import plain
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bigmodel
from bigmodel import _native


def _attention(function):
    """scores, mask and sinks through every option that both know."""

    def call(x, m, s):
        slopes = torch.tensor([0.5, 0.25, 0.125], dtype=x.dtype, device=x.device)
        return function(x, scale=0.5, mask=m, causal=True, window=(3, None), alibi_slopes=slopes, softcap=2.0, sinks=s)

    return call


FUNCTIONS = {
    "attention": _attention(bigmodel.attention_softmax),
    "masked": lambda x, m, s: bigmodel.attention_softmax(x, mask=m),
    "softmax": lambda x, m, s: bigmodel.softmax(x + m, -1),
    "log": lambda x, m, s: bigmodel.log_softmax(x + m, -1),
}
STOCK = {
    "attention": _attention(lambda x, **options: plain(x, rounded=None, **options)),
    "masked": lambda x, m, s: torch.softmax(x + m, -1),
    "softmax": lambda x, m, s: torch.softmax(x + m, -1),
    "log": lambda x, m, s: torch.log_softmax(x + m, -1),
}


def arguments(device="cpu", dtype=torch.float32, batch=2, queries=4, keys=6, grad=True):
    shapes = ((batch, 3, queries, keys), (3, queries, keys), (3,))
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for shape in shapes]


def gradients(function, tensors):
    for tensor in tensors:
        tensor.grad = None
    function(*tensors).square().sum().backward()
    return [tensor.grad for tensor in tensors]


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


@pytest.fixture
def native_calls(monkeypatch):
    """Counts native calls, and fails any whose input or output pointer is 0."""
    calls = []
    table = _native.load().cpu

    def watched(name, function, where):
        def call(*args):
            calls.append(name)
            assert all(args[i] for i in where), f"{name} was given a null pointer"
            return function(*args)

        return call

    addresses = {
        "attention_softmax_forward": (0, 3), "attention_softmax_backward": (0, 4, 5),
        "softmax_forward": (0, 1), "softmax_backward": (0, 1, 2),
    }  # fmt: skip
    for function, where in addresses.items():
        monkeypatch.setattr(table, function, watched(function, getattr(table, function), where))
    return calls


# --- autograd ---------------------------------------------------------------------------------------------------------
def test_gradcheck(device, name):
    tensors = arguments(device, torch.float64, 1, 3, 4)
    assert torch.autograd.gradcheck(FUNCTIONS[name], tensors)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], tensors)


def test_gradcheck_of_dropout(device):
    x, m, s = arguments(device, torch.float64, 1, 3, 4)

    def call(x, m, s):
        torch.manual_seed(1)
        return bigmodel.attention_softmax(x, mask=m, sinks=s, softcap=3.0, dropout_p=0.4)

    assert torch.autograd.gradcheck(call, (x, m, s))


def test_forward_mode(device, name):
    tensors = arguments(device, torch.float64, 1, 3, 4)
    assert torch.autograd.gradcheck(FUNCTIONS[name], tensors, check_forward_ad=True, check_backward_ad=False)


def test_batched_gradients(device, name):
    tensors = arguments(device, batch=1, queries=2, keys=3)
    jacobian = torch.autograd.functional.jacobian
    assert_close(*(jacobian(table[name], tuple(tensors), vectorize=True) for table in (FUNCTIONS, STOCK)))


def test_hooks_that_unpack_other_strides(device, name):
    tensors = arguments(device)
    restrided = lambda t: t.mT.contiguous().mT if t.dim() > 3 else t  # noqa: E731
    x, m, s = (t.detach().clone().requires_grad_() for t in tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), restrided):
        out = FUNCTIONS[name](x, m, s)
    out.backward(torch.ones_like(out) * out.detach())
    other = STOCK[name](*tensors)
    other.backward(other.detach())
    assert_close([x.grad, m.grad], [t.grad for t in tensors[:2]])


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_gradients_that_are_wanted(device, needed):
    tensors = arguments(device)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(needed >> i & 1))
    ours, stock = (gradients(table["attention"], tensors) for table in (FUNCTIONS, STOCK))
    for our, other in zip(ours, stock, strict=True):
        assert (our is None) == (other is None)
        assert our is None or assert_close(our, other) is None


def test_negated_views(device):
    x, m, _ = arguments(device, grad=False)
    assert_close(bigmodel.attention_softmax(torch._neg_view(x), mask=m), bigmodel.attention_softmax(-x, mask=m))


def test_changing_the_result_raises_in_backward(device):
    x, _, _ = arguments(device)
    out = bigmodel.attention_softmax(x)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_sees_the_same_dropout_twice(device, reentrant):
    tensors = arguments(device)

    def call(x, m, s):
        return bigmodel.attention_softmax(x, mask=m, sinks=s, dropout_p=0.5)

    torch.manual_seed(7)
    expected = gradients(call, tensors)
    torch.manual_seed(7)
    ours = gradients(lambda *t: checkpoint(call, *t, use_reentrant=reentrant), tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_what_stock_does(device, dtype):
    x, m, s = arguments(device, dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = torch.softmax(x, -1).dtype
        assert bigmodel.attention_softmax(x, mask=m, sinks=s).dtype is expected
        assert bigmodel.softmax(x).dtype is expected
        assert bigmodel.softmax(x, -1, torch.float64).dtype is torch.softmax(x, -1, torch.float64).dtype
        scores = x @ x.mT
        assert bigmodel.attention_softmax(scores).dtype is torch.softmax(scores, -1).dtype
        assert bigmodel.attention_softmax(scores, inplace=True).dtype is scores.dtype


# --- the dispatcher ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(device, dtype, dropout_p):
    x, m, s = arguments(device, dtype)
    seed = torch.tensor(5, device=device) if dropout_p else None
    slopes = torch.rand(3, device=device)
    forward, backward = torch.ops.bigmodel.attention_softmax_forward, torch.ops.bigmodel.attention_softmax_backward
    for args in ((x, m, slopes, s, seed, 0.5, 3, 0, 2.0, dropout_p, dtype),
                 (x, None, None, None, seed, 1.0, None, None, None, dropout_p, torch.float32)):  # fmt: skip
        torch.library.opcheck(forward.default, args)
        out, probs, sink_probs = (t.detach() for t in forward(*args))
        saved = probs if dropout_p else out
        more = (args[5:10], x.dtype, list(m.shape) if args[1] is not None else None, args[3] is not None)
        capped, sinks = x.detach() if args[8] else None, sink_probs if more[-1] else None
        tensors = (torch.randn_like(out), saved, capped, sinks, seed)
        torch.library.opcheck(
            backward.default, (*tensors, *more[0], *more[1:]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
def test_opcheck_of_plain_softmax(device, log):
    x, _, _ = arguments(device)
    torch.library.opcheck(torch.ops.bigmodel.softmax_forward.default, (x, log, torch.float32))
    out = bigmodel.softmax(x.detach())
    torch.library.opcheck(torch.ops.bigmodel.softmax_backward.default, (torch.randn_like(out), out, log, torch.float32),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))  # fmt: skip


def test_compile_fullgraph_forward_and_backward(device, name):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    def block(x, m, s):
        return FUNCTIONS[name](torch.sin(x), m, s).square()

    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    tensors = arguments(device)
    ours = gradients(compiled, tensors)
    assert "softmax_forward" in graphs[0] and "softmax_backward" in graphs[1], "the compiled graph must hold the ops"
    assert_close(ours, gradients(block, tensors))
    with torch.no_grad():
        assert_close(compiled(*tensors), block(*tensors))


def test_compile_with_inductor_and_dynamic_shapes(device):
    torch._dynamo.reset()

    def block(x, m):
        scores = torch.sin(x)
        return bigmodel.attention_softmax(scores, mask=m, causal=True, inplace=True) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for queries in (3, 5, 8):
        x, m, _ = arguments(device, queries=queries)
        out = compiled(x, m)
        out.sum().backward()
        grads, x.grad, m.grad = (x.grad, m.grad), None, None
        expected = block(x, m)
        expected.sum().backward()
        assert_close(out, expected), assert_close(grads, (x.grad, m.grad))


def test_compile_with_dropout(device):
    """The seed is drawn inside the graph: the kept elements repeat in backward, and differ from call to call."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: bigmodel.attention_softmax(x, dropout_p=0.5), fullgraph=True)
    x = torch.zeros(4, 8, 64, device=device, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    assert abs(float((first != 0).float().mean()) - 0.5) < 0.1
    grad = torch.randn_like(first)
    first.backward(grad)
    y, g = 1 / 64, grad * (first.detach() != 0) * 2
    assert_close(x.grad, y * (g - (g * y).sum(-1, keepdim=True)))


def test_symbolic_shapes():
    call = lambda x: bigmodel.attention_softmax(x, causal=True)  # noqa: E731
    graph = make_fx(call, tracing_mode="symbolic")(torch.randn(3, 8))
    x = torch.randn(5, 12)
    assert_close(graph(x), call(x))


def test_export(device):
    class Block(torch.nn.Module):
        def forward(self, x, m):
            return bigmodel.attention_softmax(x * 2, mask=m, softcap=3.0)

    x, m, _ = arguments(device, grad=False)
    program = torch.export.export(Block(), (x, m), strict=False)
    assert "bigmodel.attention_softmax_forward" in str(program.graph)
    assert_close(program.module()(x, m), Block()(x, m))


def test_fake_tensors_reach_no_native_code(name, native_calls):
    with FakeTensorMode():
        x, m, s = arguments()
        out = FUNCTIONS[name](x, m, s)
        out.sum().backward()
        assert out.shape == x.shape == x.grad.shape and m.grad.shape == m.shape
        bigmodel.attention_softmax(x, dropout_p=0.5).sum().backward()
    assert not native_calls


def test_meta_tensors_reach_no_native_code(native_calls):
    x, m, s = arguments("meta")
    out = bigmodel.attention_softmax(x, mask=m, sinks=s, causal=True)
    out.sum().backward()
    assert out.is_meta and x.grad.is_meta and s.grad.is_meta and not native_calls


def test_make_fx_records_the_op(name, native_calls):
    graph = make_fx(FUNCTIONS[name])(*arguments(grad=False))
    assert any("bigmodel" in str(node.target) for node in graph.graph.nodes)
    tensors = arguments(grad=False)
    assert_close(graph(*tensors), FUNCTIONS[name](*tensors))


def test_make_fx_with_fake_tensors(name, native_calls):
    tensors = arguments(grad=False)
    graph = make_fx(FUNCTIONS[name], tracing_mode="fake")(*tensors)
    assert not native_calls
    assert_close(graph(*tensors), FUNCTIONS[name](*tensors))


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, 0)], ids=str)
def test_vmap(device, name, in_dims, native_calls):
    batched = [
        t if dim is None else torch.stack([t * (i + 1) for i in range(3)], dim)
        for t, dim in zip(arguments(device, grad=False), in_dims, strict=True)
    ]
    ours, stock = (torch.vmap(table[name], in_dims)(*batched) for table in (FUNCTIONS, STOCK))
    assert_close(ours, stock)


def test_functional_gradients(device, name, native_calls):
    tensors = arguments(device, grad=False)
    ours, stock = (
        torch.func.grad(lambda *t, table=table: table[name](*t).square().sum(), (0, 1))(*tensors)
        for table in (FUNCTIONS, STOCK)
    )
    assert_close(ours, stock)


def test_what_a_transform_left_behind(device, name, native_calls):
    """A tensor that outlives its transform of torch.func has no memory of its own; torch's ops look through it."""
    tensors, left = arguments(device, grad=False), []
    torch.func.grad(lambda *t: left.extend(t) or t[0].sum(), (0, 1, 2))(*tensors)
    with torch.no_grad():
        assert_close(FUNCTIONS[name](*left), FUNCTIONS[name](*tensors))
    assert_close(FUNCTIONS[name](*left), FUNCTIONS[name](*tensors))


def test_torch_function_subclasses_are_not_bypassed(native_calls):
    class Tagged(torch.Tensor):
        pass

    x, m, _ = arguments(grad=False)
    out = bigmodel.attention_softmax(x.as_subclass(Tagged), mask=m)
    assert_close(torch.Tensor(out), bigmodel.attention_softmax(x, mask=m))


# --- threads ----------------------------------------------------------------------------------------------------------
def test_a_second_thread(device):
    x = torch.randn(4, 64, 128, device=device)
    expected = bigmodel.attention_softmax(x, causal=True)
    results = []
    workers = [
        threading.Thread(target=lambda: results.append(bigmodel.attention_softmax(x, causal=True))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return bigmodel.softmax(torch.full((256, 1024), index + 1.0))


def test_a_forked_dataloader_worker():
    bigmodel.softmax(torch.randn(512, 1024))  # starts the parent's thread pool, which a fork does not copy
    loader = torch.utils.data.DataLoader(_Rows(), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert sum(float(batch.sum()) for batch in loader) == pytest.approx(4 * 256, abs=1e-2)


@pytest.mark.cuda
def test_cuda_graph_capture_draws_new_dropout_at_every_replay():
    x = torch.zeros(4, 64, 128, device="cuda")
    bigmodel.attention_softmax(x, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bigmodel.attention_softmax(x, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out) and abs(float((out != 0).float().mean()) - 0.5) < 0.05


@pytest.mark.cuda
def test_the_current_stream_is_used():
    x = torch.randn(64, 1024, 1024, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = bigmodel.softmax(x * 2)
    stream.synchronize()
    assert_close(out, torch.softmax(x * 2, -1))
