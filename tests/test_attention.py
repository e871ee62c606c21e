"""bigmodel.attention: values and gradients against float64, the path it takes, and what it does with bad arguments."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bigmodel
from bigmodel import ops

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 4, 5, 9, 8
# Of the largest element: scores and weights of 16 bits are rounded between the matrix products, as in torch.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def exact(query, key, value, attn_mask=None, is_causal=False, scale=None, softcap=None, sinks=None, window=None,
          alibi_slopes=None, **_):  # fmt: skip
    """The formula, in the inputs' dtype, with the heads repeated and every exclusion as -inf."""
    if query.dim() > 2 and query.shape[-3] != key.shape[-3]:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    z = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ahead = torch.arange(z.shape[-1]) - torch.arange(z.shape[-2])[:, None] - (z.shape[-1] - z.shape[-2])
    live = torch.ones(z.shape[-2:], dtype=torch.bool)
    if attn_mask is not None:
        z = z if attn_mask.dtype is torch.bool else z + attn_mask
        live = live & (attn_mask if attn_mask.dtype is torch.bool else attn_mask > -torch.inf)
    if alibi_slopes is not None:
        z = z - alibi_slopes[:, None, None] * ahead.abs()
    left, right = window or (None, None)
    right = 0 if is_causal else right
    live = live if left is None else live & (ahead >= -left)
    live = live if right is None else live & (ahead <= right)
    z = torch.where(live, z, torch.finfo(z.dtype).min)
    if sinks is not None:
        z = torch.cat([z, sinks[:, None, None].expand(*z.shape[:-1], 1)], -1)
    weights = torch.softmax(z, -1)[..., : live.shape[-1]] * live
    return weights @ value


def inputs(queries=QUERIES, keys=KEYS, heads=HEADS, shared=HEADS, lead=(BATCH,), value_size=SIZE, dtype=torch.float32):
    def draw(heads, length, size):
        return torch.randn(*lead, *([heads] if heads else []), length, size, dtype=torch.float64).to(dtype)

    return draw(heads, queries, SIZE), draw(shared, keys, SIZE), draw(shared, keys, value_size)


def dead_rows(lead=()):
    mask = torch.rand(*lead, QUERIES, KEYS) < 0.6
    mask[..., 1, :] = False
    return mask


def bias(*shape):
    return torch.randn(*shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

# name: (shapes, options); a float mask and sinks get gradients too
CASES = {
    "plain": ({}, lambda: {}),
    "scale": ({}, lambda: {"scale": 0.7}),
    "causal, as many queries as keys": ({"keys": QUERIES}, lambda: {"is_causal": True}),
    "causal, fewer queries": ({}, lambda: {"is_causal": True}),
    "causal, more queries": ({"keys": 3}, lambda: {"is_causal": True}),
    "causal, one query": ({"queries": 1}, lambda: {"is_causal": True}),
    "dead rows": ({}, lambda: {"attn_mask": dead_rows()}),
    "padding": ({}, lambda: {"attn_mask": torch.rand(BATCH, 1, 1, KEYS) < 0.7}),
    "added mask": ({}, lambda: {"attn_mask": bias(HEADS, QUERIES, KEYS).requires_grad_()}),
    "added mask of one row": ({}, lambda: {"attn_mask": torch.randn(KEYS)}),
    "finfo.min is a number": (
        {}, lambda: {"attn_mask": torch.zeros(QUERIES, KEYS).masked_fill(dead_rows(), torch.finfo(torch.float32).min)},
    ),
    "causal and padding": ({}, lambda: {"is_causal": True, "attn_mask": dead_rows((BATCH, 1))}),
    "softcap": ({}, lambda: {"softcap": 0.8}),
    "sinks": ({}, lambda: {"sinks": torch.randn(HEADS).requires_grad_()}),
    "window": ({}, lambda: {"window": (2, 1)}),
    "alibi": ({}, lambda: {"alibi_slopes": SLOPES}),
    "all at once": (
        {"shared": 2},
        lambda: {"scale": 0.4, "is_causal": True, "window": (4, None), "softcap": 2.0, "enable_gqa": True,
                 "sinks": torch.randn(HEADS).requires_grad_(), "attn_mask": bias(BATCH, HEADS, QUERIES, KEYS),
                 "alibi_slopes": SLOPES},
    ),
    "grouped": ({"shared": 2}, lambda: {"enable_gqa": True}),
    "grouped, one shared head, causal": ({"shared": 1}, lambda: {"enable_gqa": True, "is_causal": True}),
    "grouped by broadcasting": ({"shared": 1}, lambda: {"softcap": 1.0}),
    "values of another size": ({"value_size": 3}, lambda: {}),
    "no heads": ({"heads": 0, "shared": 0, "lead": ()}, lambda: {"is_causal": True}),
    "no batch": ({"lead": ()}, lambda: {"attn_mask": dead_rows()}),
    "two batch dimensions": ({"lead": (2, 3)}, lambda: {"is_causal": True}),
    "no keys": ({"keys": 0}, lambda: {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    shapes, options = CASES[name][0], CASES[name][1]()
    tensors = [t.requires_grad_() for t in inputs(**shapes, dtype=dtype)]
    grad, results = torch.tensor(0), []
    for function, kind in ((bigmodel.attention, dtype), (exact, torch.float64)):
        own = [t.detach().to(kind).requires_grad_() for t in tensors]
        moved = {
            key: o.detach().to(kind if kind is torch.float64 else o.dtype).requires_grad_(o.requires_grad)
            if isinstance(o, torch.Tensor) and o.dtype is not torch.bool else o
            for key, o in options.items()
        }  # fmt: skip
        out = function(*own, **moved)
        grad = torch.randn_like(out) if not results else grad
        wanted = own + [o for o in moved.values() if isinstance(o, torch.Tensor) and o.requires_grad]
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(t.grad for t in wanted)])
    ours, reference = results
    assert ours[0].dtype is dtype
    for index, (own, right) in enumerate(zip(ours, reference, strict=True)):
        error = (own.double() - right).abs().max().item() if right.numel() else 0.0
        assert error <= TOLERANCE[dtype] * max(right.abs().max().item() if right.numel() else 0.0, 1e-2), index


def test_queries_without_keys_give_zeros_and_no_gradient():
    for options in ({"attn_mask": dead_rows()}, {"attn_mask": dead_rows(), "softcap": 1.0}):
        query, key, value = (t.requires_grad_() for t in inputs())
        out = bigmodel.attention(query, key, value, **options)
        out.sum().backward()
        assert not out[..., 1, :].any() and not query.grad[..., 1, :].any()
        assert all(t.grad.isfinite().all() for t in (query, key, value))


def test_large_float16_scores_do_not_overflow():
    tensors = [200 * t for t in inputs(dtype=torch.float16)]
    options = {"softcap": 500.0, "scale": 1e-3}
    assert not (tensors[0] @ tensors[1].transpose(-2, -1)).isfinite().all()
    out, reference = bigmodel.attention(*tensors, **options), exact(*(t.double() for t in tensors), **options)
    assert (out - reference).abs().max() <= 0.02 * reference.abs().max()


# --- the path ---------------------------------------------------------------------------------------------------------

# What torch's scaled_dot_product_attention computes too, with a kernel or without one.
SAME = [
    ({}, {}, "sdpa", "without storing the weights"),
    ({}, {"attn_mask": dead_rows()}, "sdpa", ""),
    ({}, {"attn_mask": torch.zeros(QUERIES, KEYS)}, "sdpa", ""),
    ({"keys": QUERIES}, {"is_causal": True}, "sdpa", ""),
    ({"queries": 1}, {"is_causal": True}, "sdpa", ""),
    ({"shared": 2}, {"enable_gqa": True}, "sdpa", ""),
    ({}, {"dropout_p": 0.1}, "fused", "no dropout"),
    ({}, {"attn_mask": torch.zeros(QUERIES, KEYS, requires_grad=True)}, "fused", "requires grad"),
    ({"lead": ()}, {}, "fused", "four dimensions"),
    ({"shared": 1}, {}, "fused", "do not broadcast"),
    ({"value_size": 3}, {}, "fused", "size"),
]
DIFFERENT = [
    ({}, {"window": (None, None)}, "sdpa", ""),
    ({}, {"is_causal": True}, "fused", "5 queries and 9 keys"),
    ({"keys": QUERIES}, {"is_causal": True, "attn_mask": torch.ones(1, QUERIES)}, "fused", "not both"),
    ({}, {"softcap": 1.0, "sinks": torch.zeros(HEADS)}, "fused", "no softcap, sinks"),
    ({}, {"window": (1, None)}, "fused", "no window"),
    ({}, {"alibi_slopes": SLOPES}, "fused", "no alibi_slopes"),
    ({}, {"return_weights": True}, "fused", "returns no weights"),
    ({}, {"attn_mask": torch.zeros(KEYS)}, "fused", "two or four"),
    ({}, {"attn_mask": torch.zeros(QUERIES, KEYS).bfloat16()}, "fused", "the queries' dtype"),
    ({"keys": 0}, {}, "fused", "empty"),
]


def ids(paths):
    return [f"{shapes}{list(options)}{words}" for shapes, options, _, words in paths]


@pytest.mark.parametrize(("shapes", "options", "name", "words"), SAME + DIFFERENT, ids=ids(SAME + DIFFERENT))
def test_explain_says_the_path_that_is_taken(shapes, options, name, words, monkeypatch):
    tensors, taken = inputs(**shapes), []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: taken.append("sdpa"))
    fused = ops.attention_softmax
    monkeypatch.setattr(ops, "attention_softmax", lambda *a, **k: taken.append("fused") or fused(*a, **k))
    path = bigmodel.attention.explain(*tensors, **options)
    assert taken == [] and path.name == name and words in path.reason and str(path) == f"{name}: {path.reason}"
    bigmodel.attention(*tensors, **options)
    assert taken == [name]


@pytest.mark.parametrize(("shapes", "options", "name", "words"), SAME, ids=ids(SAME))
def test_torch_is_chosen_where_it_has_a_kernel(shapes, options, name, words):
    if "enable_gqa" in options and torch.__version__ < "2.13":
        pytest.skip("torch's CPU kernel of 2.6 takes no grouped heads")
    chosen = torch._fused_sdp_choice(*inputs(**shapes), **options)
    assert (chosen == torch.nn.attention.SDPBackend.MATH.value) is (name == "fused")


def test_softmax_runs_in_place_of_the_scores_unless_backward_needs_them(monkeypatch):
    seen = []
    softmax = ops.attention_softmax
    monkeypatch.setattr(ops, "attention_softmax", lambda s, **k: seen.append(k["inplace"]) or softmax(s, **k))
    plain, grad = inputs(), [t.requires_grad_() for t in inputs()]
    for tensors, options in (
        (plain, {"return_weights": True}),
        (plain, {"softcap": 1.0}),
        (grad, {"return_weights": True}),
        (grad, {"dropout_p": 0.1}),
        (grad, {"softcap": 1.0}),
        (plain, {"softcap": 1.0, "sinks": torch.zeros(HEADS, requires_grad=True)}),
    ):
        bigmodel.attention(*tensors, **options)
    assert seen == [True, True, True, True, False, False]


def test_grouped_heads_are_not_repeated_in_memory():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    tensors = inputs(queries=2, keys=500, heads=8, shared=1)
    with Largest() as largest:
        bigmodel.attention(*tensors, softcap=1.0, enable_gqa=True)
    assert largest.elements == BATCH * 8 * 2 * 500 < BATCH * 8 * 500 * SIZE


# --- dropout, surroundings --------------------------------------------------------------------------------------------


def test_dropout_repeats_with_the_seed_and_keeps_its_share():
    tensors = inputs(queries=64, keys=64)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(bigmodel.attention(*tensors, dropout_p=0.25, return_weights=True))
    assert torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][1], runs[2][1])
    out, weights = runs[0]
    assert torch.equal(out, weights @ tensors[2])
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = weights != 0
    _, undropped = bigmodel.attention(*tensors, return_weights=True)
    torch.testing.assert_close(weights[kept] * 0.75, undropped[kept])


def test_gradcheck_of_the_fused_path():
    tensors = [t.requires_grad_() for t in inputs(2, 3, 2, 1, (1,), dtype=torch.float64)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(query, key, value, sinks):
        return bigmodel.attention(query, key, value, None, 0.0, True, None, True, sinks=sinks, softcap=1.5)

    torch.autograd.gradcheck(call, (*tensors, sinks))
    torch.autograd.gradgradcheck(call, (*tensors, sinks))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "is_causal": True}], ids=["sdpa", "fused"])
def test_compiles_in_one_graph(options):
    results = []
    tensors = inputs()
    for function in (bigmodel.attention, torch.compile(bigmodel.attention, fullgraph=True, backend="aot_eager")):
        own = [t.clone().requires_grad_() for t in tensors]
        out = function(*own, **options)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in own)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_functional_transforms():
    query, key, value = inputs()
    whole = bigmodel.attention(query, key, value, softcap=1.0)
    torch.testing.assert_close(torch.vmap(lambda *t: bigmodel.attention(*t, softcap=1.0))(query, key, value), whole)
    masks = torch.rand(3, QUERIES, KEYS) < 0.5
    mapped = torch.vmap(lambda mask: bigmodel.attention(query, key, value, mask, softcap=1.0))(masks)
    torch.testing.assert_close(mapped[1], bigmodel.attention(query, key, value, masks[1], softcap=1.0))
    grad = torch.func.grad(lambda q: bigmodel.attention(q, key, value, softcap=1.0).square().sum())(query)
    leaf = query.clone().requires_grad_()
    bigmodel.attention(leaf, key, value, softcap=1.0).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_checkpointing_drops_the_same_elements_again():
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        own = [t.requires_grad_() for t in inputs()]
        call = lambda *t: bigmodel.attention(*t, dropout_p=0.5)  # noqa: E731
        out = torch.utils.checkpoint.checkpoint(call, *own, use_reentrant=False) if checkpointed else call(*own)
        out.square().sum().backward()
        grads.append([t.grad for t in own])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["sdpa", "fused"])
def test_autocast_and_meta(options):
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bigmodel.attention(*tensors, **options).dtype is torch.bfloat16
        assert bigmodel.attention(tensors[0].bfloat16(), *tensors[1:], **options).dtype is torch.bfloat16
    out = bigmodel.attention(*(t.to("meta") for t in tensors), **options)
    assert out.is_meta and out.shape == tensors[0].shape


# --- bad arguments ----------------------------------------------------------------------------------------------------

Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8)
BAD = [
    ((1, K, V), {}, TypeError, "query must be a torch.Tensor, got int"),
    ((Q.long(), K, V), {}, TypeError, "query has dtype torch.int64"),
    ((Q, K.double(), V), {}, TypeError, "key has dtype torch.float64, but query has torch.float32"),
    ((Q, K, V.to("meta")), {}, ValueError, "value is on device 'meta', but query is on 'cpu'"),
    ((Q[0, 0, 0], K, V), {}, ValueError, "query has shape (8,)"),
    ((Q, K[..., :4], V), {}, ValueError, "key has head size 4, but query has 8"),
    ((Q, K, V[..., :3, :]), {}, ValueError, "value has 3 positions, but key has 5"),
    ((Q, K[:, :2], V[:, :2]), {}, ValueError, "must broadcast, or enable_gqa be True"),
    ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, ValueError, "query has 4 heads, key 3 and value 3"),
    ((Q, K[:, :2], V), {"enable_gqa": True}, ValueError, "key 2 and value 4"),
    ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, ValueError, "enable_gqa needs"),
    ((Q, K, V), {"enable_gqa": 1}, TypeError, "enable_gqa must be a bool, got int"),
    ((Q, K, V), {"is_causal": "yes"}, TypeError, "is_causal must be a bool, got str"),
    ((Q, K, V), {"return_weights": None}, TypeError, "return_weights must be a bool"),
    ((Q, K, V), {"attn_mask": [True]}, TypeError, "attn_mask must be a torch.Tensor, got list"),
    ((Q, K, V), {"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "attn_mask has dtype torch.int32"),
    ((Q, K, V), {"attn_mask": torch.ones(5, 3)}, ValueError, "does not broadcast to the scores' (2, 4, 3, 5)"),
    ((Q, K, V), {"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; it must be at least 0 and less than 1"),
    ((Q, K, V), {"scale": "a"}, TypeError, "scale must be a number, got str"),
    ((Q, K, V), {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ((Q, K, V), {"sinks": torch.zeros(3)}, ValueError, "sinks has shape (3,)"),
    ((Q, K, V), {"alibi_slopes": torch.zeros(5)}, ValueError, "alibi_slopes has shape (5,)"),
    ((Q, K, V), {"window": (-1, 0)}, ValueError, "FlashAttention's -1 for no limit is None here"),
    ((Q, K, V), {"attn_mask": torch.ones(3, 5).double()}, TypeError, "attn_mask is float64, but the scores are torch"),
    ((Q, K, V), {"window": 3}, TypeError, "window must be a pair"),
    ((Q, K, V), {"attn_mask": torch.ones(3, 5).to_sparse()}, TypeError, "attn_mask must be a dense torch.strided"),
    ((Q, K, V), {"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "alibi_slopes requires grad"),
    ((Q[0, 0], K[0, 0], V[0, 0]), {"sinks": torch.zeros(4)}, ValueError, "sinks needs scores (..., heads"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["attention", "attention.explain"])
@pytest.mark.parametrize(("tensors", "options", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_arguments_get_one_sentence(tensors, options, error, words, name):
    function = bigmodel.attention if name == "attention" else bigmodel.attention.explain
    with pytest.raises(error) as caught:
        function(*tensors, **options)
    message = str(caught.value)
    assert words in message and message.startswith(f"{name}: ") and message.endswith(".") and "\n" not in message


def test_autocast_to_float16_does_not_overflow_the_scores():
    query, value = torch.randn(1, 2, 8, 64) * 60, torch.randn(1, 2, 8, 64)
    with torch.autocast("cpu", torch.float16):
        out, _ = bigmodel.attention(query, query.clone(), value, return_weights=True)
        assert out.isfinite().all()


def test_a_float32_mask_keeps_its_numbers_under_autocast():
    query = torch.randn(1, 2, 4, 8)
    mask = torch.full((4, 4), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        alone = bigmodel.attention(query, query, query, mask)
        beside, _ = bigmodel.attention(query, query, query, mask, return_weights=True)
    torch.testing.assert_close(alone, beside)
    assert alone.abs().sum() > 0


def test_autocast_leaves_float64_alone():
    query, sinks = torch.randn(1, 2, 4, 8).double(), torch.randn(2).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = bigmodel.attention(query, query, query, sinks=sinks)
    assert torch.equal(out, bigmodel.attention(query, query, query, sinks=sinks))


def test_a_mask_of_another_device_is_refused():
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention: attn_mask is on device 'meta', but the scores are on 'cpu'"):
        bigmodel.attention(query, query, query, torch.zeros(3, 3, device="meta"))


def test_grouped_heads_with_batches_that_broadcast():
    query, key, mask = torch.randn(1, 4, 3, 8), torch.randn(5, 2, 6, 8), torch.rand(5, 1, 1, 6) > 0.3
    mask[..., 0] = True
    out = bigmodel.attention(query, key, key, mask, enable_gqa=True)
    repeated = key.repeat_interleave(2, 1)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query.expand(5, -1, -1, -1), repeated, repeated, mask)
    )
