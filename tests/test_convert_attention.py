"""bigmodel.convert(attention=True) on the models of transformers, against their own eager attention."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import bigmodel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WINDOW = 5  # shorter than the sequences; every second layer of Gemma-2 and GPT-OSS, every one of Mistral

MODELS = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TINY | {"sliding_window": WINDOW, "attn_logit_softcapping": 0.3}),
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        TINY | {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | DROPOUT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TINY),
    "mistral": ("MistralForCausalLM", "MistralConfig", TINY | {"sliding_window": WINDOW}),
    "bert": ("BertForMaskedLM", "BertConfig", TINY | BERT_DROPOUT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}  # fmt: skip
DECODERS = ["gemma2", "gpt_oss", "gpt2", "llama", "mistral"]
BATCH, LENGTH = 2, 12
PADDED = {"none": slice(0, 0), "right": slice(8, None), "left": slice(0, 4)}


def build(name, **options):
    model_class, config_class, config = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**config | options, attn_implementation="eager")
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # sinks and biases are zeros at first
    return model


def tokens():
    return torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7 % 61 + 1


def padding(where):
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, PADDED[where]] = 0
    return mask


def step(model, where, **options):
    """Logits and gradients; what a padded position predicts is left out of the loss."""
    mask = padding(where)
    targets = mask.clone()
    targets[:, 1:] &= mask[:, :-1]
    labels = tokens().masked_fill(targets == 0, -100)
    model.zero_grad()
    options |= {} if where == "none" else {"attention_mask": mask}
    out = model(input_ids=tokens(), labels=labels, **options)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, share, what=""):
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= share * size, f"{what}: off by {error:.2e} of {size:.2e}"


def assert_same_step(ours, eager, where):
    live = padding(where).bool()
    assert_close(ours[0].logits[live], eager[0].logits[live], 2e-6, "logits")
    assert ours[1].keys() == eager[1].keys()
    largest = max(grad.abs().max().item() for grad in eager[1].values())
    for name, grad in eager[1].items():
        assert (ours[1][name] - grad).abs().max() <= 2e-6 * max(largest, 1e-3), name


# --- equal to eager attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PADDED)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, where):
    model = build(name)
    eager = step(model, where)
    report = bigmodel.convert(model, norms=False, attention=True)
    assert not report.left and all(entry.what == "attention, was eager" for entry in report.replaced)
    assert_same_step(step(model, where), eager, where)
    bigmodel.revert(model)
    back = step(model, where)
    assert torch.equal(back[0].logits, eager[0].logits)
    assert all(torch.equal(back[1][key], grad) for key, grad in eager[1].items())


@pytest.mark.parametrize("name", MODELS)
def test_output_attentions(name):
    model, where = build(name), "left"
    key = "encoder_attentions" if name == "t5" else "attentions"
    eager = step(model, where, output_attentions=True)[0][key]
    bigmodel.convert(model, norms=False, attention=True)
    ours = step(model, where, output_attentions=True)[0][key]
    assert len(ours) == len(eager) == 2
    queries = padding(where).bool()[:, None, :].expand(BATCH, 4, LENGTH)
    for own, weights in zip(ours, eager, strict=True):
        torch.testing.assert_close(own[queries], weights[queries], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache(name, cache, where):
    model = build(name).eval()
    mask = padding(where)

    def decode():
        past = transformers.DynamicCache(config=model.config)
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        logits, start = [], 0
        for end in (7, 8, 10, LENGTH):  # the prompt, one token, several at once
            out = model(tokens()[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
            logits.append(out.logits)
            start = end
        return torch.cat(logits, 1)

    eager, whole = decode(), model(tokens(), attention_mask=mask).logits
    bigmodel.convert(model, norms=False, attention=True)
    live = mask.bool()
    ours = decode()
    assert_close(ours[live], eager[live], 2e-6)
    assert_close(ours[live], whole[live], 1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
@torch.no_grad()
def test_generation(name):
    model = build(name).eval()
    arguments = {"attention_mask": padding("left"), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(), **arguments)
    bigmodel.convert(model, attention=True)
    assert torch.equal(model.generate(tokens(), **arguments), expected)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_no_token_sees_the_future(name):
    model = build(name).eval()
    bigmodel.convert(model, norms=False, attention=True)
    changed = tokens()
    changed[:, 7:] = 3
    for mask in (None, padding("left")):
        one, other = (model(t, attention_mask=mask).logits for t in (tokens(), changed))
        assert torch.equal(one[:, :7], other[:, :7]) and not torch.equal(one[:, 7:], other[:, 7:])


def test_bert_sees_the_future():
    model = build("bert").eval()
    bigmodel.convert(model, norms=False, attention=True)
    changed = tokens()
    changed[:, 7:] = 3
    assert not torch.equal(model(tokens()).logits[:, :7], model(changed).logits[:, :7])


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_masks_of_the_caller(name):
    """A float mask of four dimensions, and sequences packed into one."""
    model = build(name)
    added = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e4)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(BATCH, -1)
    calls = [{"attention_mask": added}, {"position_ids": positions}]
    eager = [model(tokens(), **call).logits for call in calls]
    bigmodel.convert(model, norms=False, attention=True)
    for call, expected in zip(calls, eager, strict=True):
        assert_close(model(tokens(), **call).logits, expected, 2e-6)


def test_dropout_in_training_only():
    model = build("llama", attention_dropout=0.5)
    bigmodel.convert(model, norms=False, attention=True)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.train()(tokens()).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(model.eval()(tokens()).logits, model(tokens()).logits)


def test_trains_in_bfloat16_under_autocast_with_checkpointing():
    model = build("gemma2").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = step(model, "right")
        bigmodel.convert(model, attention=True)
        model.gradient_checkpointing_enable()
        ours = step(model, "right")
    assert ours[0].loss.item() == pytest.approx(eager[0].loss.item(), rel=0.02)
    assert all(grad.isfinite().all() for grad in ours[1].values())


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_layer_compiles_in_one_graph(name):
    model = build(name)
    bigmodel.convert(model, attention=True)
    attention, hidden = model.model.layers[1].self_attn, torch.randn(BATCH, LENGTH, 32, requires_grad=True)
    position = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    results = []
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        out = run(hidden, position_embeddings=position, attention_mask=None)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), hidden)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# --- the report, copies, and what is left -----------------------------------------------------------------------------


def test_converting_twice_and_reverting():
    model = build("llama")
    first = bigmodel.convert(model, attention=True)
    assert first.replaced[-1] == ("", "LlamaForCausalLM", "attention, was eager") and len(first.replaced) == 6
    assert "attention, was eager" in str(first) and not first.left
    second = bigmodel.convert(model, attention=True)
    assert not second.replaced and second.left[-1].reason == "its attention is fused already"
    assert bigmodel.revert(model).replaced[-1] == ("", "LlamaForCausalLM", "its attention, eager")
    assert model.config._attn_implementation == "eager" and not bigmodel.revert(model).replaced


def test_attention_is_left_alone_unless_asked():
    model = build("llama")
    assert len(bigmodel.convert(model).replaced) == 5 and model.config._attn_implementation == "eager"


def test_each_model_within_a_model_gets_its_own_back():
    model = build("t5")
    model.decoder.config._attn_implementation = "sdpa"
    report = bigmodel.convert(torch.nn.ModuleList([model]), norms=False, attention=True)
    assert {entry.name: entry.what for entry in report.replaced} == {
        "0": "attention, was eager", "0.encoder": "attention, was eager", "0.decoder": "attention, was sdpa",
    }  # fmt: skip
    bigmodel.revert(model)
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "sdpa"


def test_what_was_set_since_stays():
    model = build("llama")
    bigmodel.convert(model, norms=False, attention=True)
    model.set_attn_implementation("sdpa")
    report = bigmodel.revert(model)
    assert not report.replaced and report.left[0].reason == "its attention was set to sdpa after convert"
    assert model.config._attn_implementation == "sdpa"


def test_copies_and_pickles_stay_converted(tmp_path):
    model = build("gemma2")
    bigmodel.convert(model, norms=False, attention=True)
    logits = step(model, "none")[0].logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(copied, "none")[0].logits, logits)
        assert len(bigmodel.revert(copied).replaced) == 1 and model.config._attn_implementation == "bigmodel"
    torch.save(model, tmp_path / "model.pt")
    script = "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); model(torch.ones(1, 4).long())"
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], check=True)
    model.save_pretrained(tmp_path)
    assert "bigmodel" not in (tmp_path / "config.json").read_text()
    loaded = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="bigmodel")
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_other_attention_is_left_and_named():
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64)
    report = bigmodel.convert(transformers.MptForCausalLM(config), norms=False, attention=True)
    assert not report.replaced and "AttentionInterface" in report.left[0].reason
    layer = torch.nn.TransformerEncoderLayer(8, 2)
    report = bigmodel.convert(layer, norms=False, attention=True)
    assert report.left[0][:2] == ("self_attn", "MultiheadAttention") and "bigmodel.nn" in report.left[0].reason
    report = bigmodel.convert(torch.nn.Linear(2, 2), attention=True)
    assert report.left[0].reason == "it holds no model of transformers, and no attention of torch's"


def test_an_older_transformers_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # its lazy imports exchange the module
    with pytest.raises(RuntimeError, match="attention=True needs transformers >= 5, this is 4.57.1"):
        bigmodel.convert(model, attention=True)


def test_continuous_batching_is_refused():
    from bigmodel import _transformers

    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="continuous batching"):
        _transformers.attention_forward(torch.nn.Module(), query, query, query, None, cache=object())
