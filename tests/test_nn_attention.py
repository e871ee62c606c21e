"""bigmodel.nn's attention: MultiheadAttention against torch.nn's, AttentionSoftmax against its function, sinusoids."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import bigmodel
from bigmodel.nn import AttentionSoftmax, MultiheadAttention, SinusoidalPositionalEncoding, alibi_slopes

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 4

# --- MultiheadAttention -----------------------------------------------------------------------------------------------


def pair(**options):
    """torch's module and ours with the same parameters, none of them zero."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = MultiheadAttention(WIDTH, HEADS, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def sequences(options, self_attention=False, batched=True):
    def draw(length, size):
        order = (BATCH, length) if options.get("batch_first") else (length, BATCH)
        return torch.randn(*(order if batched else (length,)), size)

    query = draw(QUERIES, WIDTH)
    if self_attention:
        return query, query, query
    return query, draw(KEYS, options.get("kdim") or WIDTH), draw(KEYS, options.get("vdim") or WIDTH)


def compare(stock, ours, tensors, **call):
    results = []
    for module in (stock, ours):
        module.zero_grad()
        leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        out, weights = module(*(leaves[id(t)] for t in tensors), **call)
        out.square().sum().backward()
        grads = [leaf.grad for leaf in leaves.values()] + [p.grad for p in module.parameters()]
        results.append((out.detach(), weights, grads))
    (out, weights, grads), (own_out, own_weights, own_grads) = results
    torch.testing.assert_close(own_out, out, rtol=1e-5, atol=1e-5)
    assert (weights is None) is (own_weights is None)
    if weights is not None:
        torch.testing.assert_close(own_weights, weights, rtol=1e-5, atol=1e-6)
    for own, grad in zip(own_grads, grads, strict=True):
        torch.testing.assert_close(own, grad, rtol=1e-4, atol=1e-4)


def some(*shape):
    """A mask that leaves every query something: True is masked out."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


CONSTRUCTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
]
MASKS = {
    "none": lambda: {},
    "padding": lambda: {"key_padding_mask": some(BATCH, KEYS)},
    "attn_mask": lambda: {"attn_mask": some(QUERIES, KEYS)},
    "both": lambda: {"attn_mask": some(QUERIES, KEYS), "key_padding_mask": some(BATCH, KEYS)},
    "of each head": lambda: {"attn_mask": some(BATCH * HEADS, QUERIES, KEYS), "key_padding_mask": some(BATCH, KEYS)},
    "added": lambda: {"attn_mask": torch.randn(QUERIES, KEYS)},
    "added, both": lambda: {"attn_mask": torch.randn(QUERIES, KEYS), "key_padding_mask": torch.randn(BATCH, KEYS)},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_computes_what_torch_computes(options, mask, need_weights):
    compare(*pair(**options), sequences(options), need_weights=need_weights, **MASKS[mask]())


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_of_two_kinds():
    call = {"attn_mask": torch.randn(QUERIES, KEYS), "key_padding_mask": some(BATCH, KEYS)}
    compare(*pair(), sequences({}), **call)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_causal_and_without_a_batch(options, need_weights):
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    stock, ours = pair(**options)
    for batched in (True, False):
        own = sequences(options, self_attention=True, batched=batched)
        cross = sequences(options, batched=batched)
        compare(stock, ours, own, need_weights=need_weights)
        hint = not options.get("add_zero_attn")  # torch takes the hint for the mask, and forgets that zeros are seen
        compare(stock, ours, own, need_weights=need_weights, attn_mask=causal, is_causal=hint or need_weights)
        padded = {"key_padding_mask": some(BATCH, KEYS) if batched else some(KEYS)}
        compare(stock, ours, cross, need_weights=need_weights, average_attn_weights=False, **padded)
    shared = torch.randn_like(sequences(options)[1])
    compare(stock, ours, (sequences(options)[0], shared, shared), need_weights=need_weights)


def test_a_hint_is_believed_with_padding_and_not_where_it_could_mean_two_things():
    stock, ours = pair(batch_first=True)
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    own = sequences({"batch_first": True}, self_attention=True)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, 3:] = True
    compare(stock, ours, own, attn_mask=causal, is_causal=True, key_padding_mask=padding)
    top_left = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    compare(stock, ours, sequences({"batch_first": True}), attn_mask=top_left, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_without_keys_give_no_nan(need_weights):
    stock, ours = pair(batch_first=True)
    tensors = sequences({"batch_first": True})
    masked = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    masked[1] = True
    assert stock(*tensors, key_padding_mask=masked)[0].isnan().any()
    out, weights = ours(*tensors, key_padding_mask=masked, need_weights=need_weights)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())
    assert torch.equal(out[1], ours.out_proj.bias.expand(QUERIES, WIDTH))
    if need_weights:
        assert not weights[1].any() and weights[0].sum(-1).allclose(torch.ones(QUERIES))


def test_dropout_in_training_only():
    ours = MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    tensors = sequences({})
    assert (ours(*tensors)[1] == 0).sum() > 0
    evaluated = ours.eval()(*tensors)
    assert torch.equal(evaluated[0], ours(*tensors)[0]) and (evaluated[1] > 0).all()


def test_copies_and_torch_layers_hold_it():
    stock, ours = pair(batch_first=True)
    assert isinstance(ours, nn.MultiheadAttention)
    tensors = sequences({"batch_first": True})
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is MultiheadAttention and torch.equal(copied(*tensors)[0], ours(*tensors)[0])
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    source, padding = torch.randn(BATCH, QUERIES, WIDTH), torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0, 3:] = True
    expected = layer(source, src_key_padding_mask=padding)
    layer.self_attn.__class__ = MultiheadAttention
    torch.testing.assert_close(layer(source, src_key_padding_mask=padding), expected)
    with torch.no_grad():  # torch's fast path, which reads the parameters and calls no forward
        fast = layer.eval()(source, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], expected[~padding])


def test_compiles_in_one_graph():
    _, ours = pair(batch_first=True)
    tensors = sequences({"batch_first": True})
    mask = some(BATCH, KEYS)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for own, other in zip(ours(*tensors, mask), compiled(*tensors, mask), strict=True):
        torch.testing.assert_close(other, own)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)])


X = torch.zeros(QUERIES, BATCH, WIDTH)
BAD = [
    ((nested(), X, X), {}, TypeError, "query must be a dense torch.strided tensor"),
    ((X, X[..., :3], X), {}, ValueError, "key has shape (5, 3, 3); accepted is (length, batch, 16)"),
    ((X, X[0], X), {}, ValueError, "key has shape (3, 16)"),
    ((X, X, X[:2]), {}, ValueError, "value has shape (2, 3, 16), but key has (5, 3, 16)"),
    ((X, X[:, :1], X[:, :1]), {}, ValueError, "key has a batch of 1, but query one of 3"),
    ((X, X, X), {"is_causal": True}, ValueError, "is_causal is a hint about attn_mask, which is None"),
    ((X, X, X), {"attn_mask": torch.ones(5, 5, dtype=torch.uint8)}, TypeError, "attn_mask is torch.uint8"),
    ((X, X, X), {"attn_mask": torch.ones(5, 5).double()}, TypeError, "attn_mask is float64, but the scores are torch"),
    ((X, X, X), {"attn_mask": torch.ones(5, 4)}, ValueError, "(5, 4); accepted is (5, 5) or (12, 5, 5)"),
    ((X, X, X), {"key_padding_mask": torch.ones(5, 3)}, ValueError, "(5, 3); accepted is (3, 5)"),
    ((X, X, X), {"key_padding_mask": 1}, TypeError, "key_padding_mask is int"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_arguments_get_one_sentence(tensors, options, error, words):
    with pytest.raises(error) as caught:
        MultiheadAttention(WIDTH, HEADS)(*tensors, **options)
    message = str(caught.value)
    assert words in message and message.startswith("MultiheadAttention: ") and message.endswith(".")


# --- AttentionSoftmax -------------------------------------------------------------------------------------------------


def test_attention_softmax_is_its_function():
    scores, mask = torch.randn(2, HEADS, 5, 7), torch.rand(5, 7) < 0.8
    options = {"scale": 0.3, "causal": True, "window": (3, None), "softcap": 2.0, "out_dtype": torch.float64}
    module = AttentionSoftmax(HEADS, alibi=True, sinks=True, dropout_p=0.5, **options).eval()
    with torch.no_grad():
        module.sinks.normal_()
    assert list(module.state_dict()) == ["sinks"]
    own = {"alibi_slopes": alibi_slopes(HEADS), "sinks": module.sinks}
    expected = bigmodel.attention_softmax(scores, mask=mask, **options, **own)
    assert torch.equal(module(scores, mask), expected)
    torch.manual_seed(1)
    dropped = module.train()(scores, mask)
    torch.manual_seed(1)
    assert torch.equal(dropped, bigmodel.attention_softmax(scores, mask=mask, dropout_p=0.5, **options, **own))
    dropped.square().sum().backward()
    assert module.sinks.grad.any()
    assert "window=(3, None)" in repr(module) and "sinks" in repr(module)
    copied = pickle.loads(pickle.dumps(module.eval()))
    assert torch.equal(copied(scores, mask), expected)
    assert AttentionSoftmax(inplace=True)(scores) is scores


def test_attention_softmax_needs_heads_for_what_is_per_head():
    with pytest.raises(ValueError, match="num_heads is None"):
        AttentionSoftmax(sinks=True)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dropout_p": 1.0}, "dropout_p is 1.0; it must be at least 0"),
        ({"softcap": 0}, "softcap is 0; it must be greater than 0"),
        ({"window": (-1, 0)}, "window is (-1, 0); neither side may be negative"),
    ],
    ids=str,
)
def test_attention_softmax_refuses_at_once_what_its_calls_would(option, words):
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as caught:
        AttentionSoftmax(**option)
    assert str(caught.value).startswith(f"AttentionSoftmax: {words}")
    AttentionSoftmax(dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state), "making a module draws nothing"


def test_modules_name_themselves_in_what_they_refuse():
    with pytest.raises(TypeError, match=r"^AttentionSoftmax: inplace must be a bool, got str\."):
        AttentionSoftmax(inplace="yes")
    for dropout in (1.5, 1.0, -0.1):
        with pytest.raises(ValueError, match=rf"^MultiheadAttention: dropout is {dropout}; it must be at least 0 and"):
            MultiheadAttention(8, 2, dropout)
    with pytest.raises(TypeError, match=r"^MultiheadAttention: dropout must be a number, got str\."):
        MultiheadAttention(8, 2, dropout="some")


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    with pytest.raises(ValueError, match="num_heads is 0"):
        alibi_slopes(0)


# --- SinusoidalPositionalEncoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 7, 1])
def test_sinusoids_follow_the_formula(size):
    module = SinusoidalPositionalEncoding(size, max_length=3000)
    assert not module.state_dict()
    out = module(torch.zeros(2, 3000, size))
    for position in (0, 1, 2999):
        for column in range(size):
            angle = torch.tensor(position / 10000 ** (2 * (column // 2) / size), dtype=torch.float64)
            exact = angle.cos() if column % 2 else angle.sin()
            assert abs(out[1, position, column] - exact) < 1e-6


def test_sinusoids_offset_layout_and_dtype():
    module = SinusoidalPositionalEncoding(8, max_length=20)
    input = torch.randn(2, 6, 8)
    assert torch.equal(module(input, offset=3), input + module.table[3:9])
    other = SinusoidalPositionalEncoding(8, max_length=20, batch_first=False)
    assert torch.equal(other(input.transpose(0, 1)), module(input).transpose(0, 1))
    assert module(input.bfloat16()).dtype is torch.bfloat16
    assert torch.equal(module(input.bfloat16()), (input.bfloat16().float() + module.table[:6]).bfloat16())
    meta = SinusoidalPositionalEncoding(8, max_length=20, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(meta.table, module.table)


@pytest.mark.parametrize(
    ("input", "offset", "words"),
    [
        (torch.zeros(2, 3, 7), 0, "input has shape (2, 3, 7); accepted is (..., length, 8)"),
        (torch.zeros(2, 3, 8), 18, "positions 18 to 20, but max_length is 20"),
        (torch.zeros(2, 3, 8), -1, "positions -1 to 1"),
    ],
)
def test_sinusoids_refuse(input, offset, words):
    with pytest.raises(ValueError) as caught:
        SinusoidalPositionalEncoding(8, max_length=20)(input, offset)
    assert words in str(caught.value)


def test_sinusoids_refuse_sizes():
    for arguments in ((0,), (8, 0), (8, True), (8.0,)):
        with pytest.raises(ValueError, match="must be a positive integer"):
            SinusoidalPositionalEncoding(*arguments)
