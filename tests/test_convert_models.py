"""bigmodel.convert on the models of transformers: built from tiny configs, random weights, nothing downloaded."""

import copy
import pickle

import pytest
import torch

import bigmodel

transformers = pytest.importorskip("transformers")

BF16, F32 = torch.bfloat16, torch.float32
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# name: model class, config class, config, number of norms in two layers, what replaces them
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TINY, 2 * 2 + 1, "rms_norm, returns the promoted dtype"),
    "mistral": ("MistralForCausalLM", "MistralConfig", TINY, 2 * 2 + 1, "rms_norm, returns the promoted dtype"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TINY, 2 * 2 + 1, "rms_norm, returns the promoted dtype"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TINY, 2 * 4 + 1, "rms_norm, returns the promoted dtype"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TINY, 2 * 2 + 1, "rms_norm, returns the promoted dtype"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", TINY, 2 * 2 + 1, "rms_norm, 1 + weight, returns the input's dtype"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TINY, 2 * 4 + 1, "rms_norm, 1 + weight, returns the input's dtype"),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", TINY, 2 * 6 + 1, "rms_norm, 1 + weight, returns the input's dtype",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, 2 * 2 + 2 * 3 + 2, "rms_norm, returns the weight's dtype"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | DROPOUT, 2 * 2 + 1, "layer_norm, returns the input's dtype"),
    "bert": ("BertForMaskedLM", "BertConfig", TINY | BERT_DROPOUT, 2 * 2 + 2, "layer_norm, returns the input's dtype"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TINY, 2 * 2 + 1, "layer_norm, returns the input's dtype"),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    model_class, config_class, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name.lower() or "ln_" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # not all ones and zeros
    return model


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


def is_fused(module: torch.nn.Module) -> bool:
    return "fused by bigmodel" in module.extra_repr()


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a fixed batch and the gradients of its loss."""
    tokens = torch.arange(2 * 12).reshape(2, 12) * 7 % 61 + 1
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: torch.Tensor, expected: torch.Tensor, share: float, name: str = "") -> None:
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= share * size + 1e-7, f"{name}: off by {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_replaced_and_the_model_computes_the_same(name):
    model = build(name)
    parameters = dict(model.named_parameters())
    logits, grads = step(model)
    report = bigmodel.convert(model)

    count, what = MODELS[name][3:]
    assert report.left == []
    assert len(report.replaced) == count
    assert {entry.what for entry in report.replaced} == {what}
    assert len(norms_of(model)) == count and all(map(is_fused, norms_of(model)))
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[key] is parameters[key] for key in after)

    fused_logits, fused_grads = step(model)
    assert_close(fused_logits, logits, 1e-5)  # float32 sums in another order, through two layers
    assert fused_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert_close(fused_grads[key], grad, 1e-4, key)

    bigmodel.revert(model)
    assert not any(map(is_fused, norms_of(model)))
    reverted_logits, reverted_grads = step(model)
    assert torch.equal(reverted_logits, logits)
    assert all(torch.equal(reverted_grads[key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("weight_dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("input_dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_dtype_returned_is_the_original_s(name, input_dtype, weight_dtype):
    norm = norms_of(build(name))[0].to(weight_dtype)
    input = torch.randn(3, next(norm.parameters()).numel()).to(input_dtype)
    try:
        expected = norm(input)
    except RuntimeError:
        assert isinstance(norm, torch.nn.LayerNorm)  # stock refuses a float32 input with a bfloat16 weight
        expected = norm.float()(input)
        norm.to(weight_dtype)
    assert len(bigmodel.convert(norm).replaced) == 1
    out = norm(input)
    assert out.dtype is expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.02, atol=0.02)


def test_the_dtype_table_says_what_the_classes_do():
    returned = {}
    for name in ("llama", "gemma", "t5", "gpt2"):
        norm = norms_of(build(name))[0]
        bigmodel.convert(norm)
        for mix in ((F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)):
            norm.to(mix[1])
            returned[name, mix] = norm(torch.randn(2, 32).to(mix[0])).dtype
    assert [returned["llama", mix] for mix in ((BF16, F32), (F32, BF16), (BF16, BF16))] == [F32, F32, BF16]
    assert [returned["gemma", mix] for mix in ((BF16, F32), (F32, BF16), (BF16, BF16))] == [BF16, F32, BF16]
    assert [returned["t5", mix] for mix in ((BF16, F32), (F32, BF16), (BF16, BF16))] == [F32, BF16, BF16]
    assert [returned["gpt2", mix] for mix in ((BF16, F32), (F32, BF16), (BF16, BF16))] == [BF16, F32, BF16]


@pytest.mark.parametrize(
    ("model_class", "config_class", "config", "gated"),
    [
        (
            "Mamba2ForCausalLM", "Mamba2Config",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2,
             "state_size": 8, "chunk_size": 8},
            "MambaRMSNormGated",
        ),
        (
            "Qwen3NextForCausalLM", "Qwen3NextConfig",
            TINY | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1,
                    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "Qwen3NextRMSNormGated",
        ),
    ],
)  # fmt: skip
def test_gated_norms_are_left(model_class, config_class, config, gated):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    logits, _ = step(model)
    report = bigmodel.convert(model)
    assert {entry.cls for entry in report.left} == {gated}
    assert all("gate" in entry.reason for entry in report.left)
    assert len(report.left) + len(report.replaced) == len(norms_of(model))
    assert all(is_fused(module) is (type(module).__name__ != gated) for module in norms_of(model))
    assert_close(step(model)[0], logits, 1e-5)


@pytest.mark.parametrize("name", ("llama", "gemma3", "t5", "gpt2"))
def test_copies_pickles_and_state_dicts(name, tmp_path):
    model = build(name)
    keys = list(model.state_dict())
    bigmodel.convert(model)
    logits, _ = step(model)
    assert list(model.state_dict()) == keys

    torch.save(model, tmp_path / "model.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
    }
    for how, copied in copies.items():
        assert all(map(is_fused, norms_of(copied))), how
        assert {type(m) for m in norms_of(copied)} == {type(m) for m in norms_of(model)}, how
        assert torch.equal(step(copied)[0], logits), how
        bigmodel.revert(copied)
        assert not any(map(is_fused, norms_of(copied))), how
    assert all(map(is_fused, norms_of(model)))

    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    assert_close(step(fresh)[0], logits, 1e-5)


@pytest.mark.parametrize("name", ("llama", "gemma", "gpt2"))
def test_a_block_compiles_in_one_graph(name):
    model = build(name)
    bigmodel.convert(model)
    block = model.transformer.h[0] if name == "gpt2" else model.model.layers[0]
    input = torch.randn(2, 12, 32, requires_grad=True)
    arguments = {}
    if name != "gpt2":
        arguments["position_embeddings"] = model.model.rotary_emb(input, torch.arange(12)[None])
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = run(input, **arguments)
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out.square().sum(), input)
        results.append((out.detach(), grad))
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_close(compiled, eager, 1e-5)


def test_generation_and_training_go_on_with_an_optimizer_made_before():
    model = build("llama")
    stock = copy.deepcopy(model)
    losses = []
    tokens = torch.arange(24).reshape(2, 12)
    for trained, converted in ((model, True), (stock, False)):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        if converted:
            bigmodel.convert(trained)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            loss = trained(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0] / 2
    assert model.eval().generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_autocast_gives_the_dtypes_of_the_original():
    model = build("llama")
    seen = []
    with torch.autocast("cpu", dtype=BF16):
        for _ in range(2):
            seen.append({})
            handles = [
                module.register_forward_hook(lambda m, args, out, name=name: seen[-1].update({name: out.dtype}))
                for name, module in model.named_modules()
                if module in norms_of(model)
            ]
            step(model)
            for handle in handles:
                handle.remove()
            bigmodel.convert(model)
    assert len(seen[0]) == MODELS["llama"][3]
    assert seen[0] == seen[1]
