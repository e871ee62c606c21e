"""Cases of attention in models of transformers: with soft-cap (Gemma-2) and with sinks (GPT-OSS), against eager.

`<model>_attention` is what lies between the projections of one layer: from queries, keys and values to their gradients,
through the function that the model calls, with the mask that it gets; rows x keys are its scores. `<model>_step` is a
training step of a model of two layers on one sequence: loss, gradients, torch's fused AdamW; rows x cols are
tokens x hidden size. One sequence, since a step on four takes seconds of matrix products, which are every contender's.

Bytes, each tensor once: of the attention its scores, written by one product and read by the next in forward, twice
read and once written in backward; of a step the parameters, read in forward and backward, and their gradients, then
four tensors of their size read and three written by AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bigmodel
from bigmodel import _transformers
from bigmodel.benchmarks import contenders
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal
from bigmodel.benchmarks.harness import OURS, Case, Contender, Workload

EAGER, COMPILE = "eager", "compile"
BOTH = "forward+backward"
FLOATS = (torch.float32, torch.bfloat16)
MODELS = ("gemma2", "gpt_oss")
CAUSAL, PADDED = "attention", "padded_attention"
HIDDEN, SIZE, HEADS, LAYERS, VOCABULARY = 512, 64, 8, 2, 4096
BATCH = {512: 4, 2048: 1}  # by length
KINDS = ((CAUSAL, 512), (PADDED, 512), (CAUSAL, 2048))  # 2048 is one sequence: nothing is padded to another's length
QUICK_LENGTH = 512

_CONFIG = {
    "hidden_size": HIDDEN, "head_dim": SIZE, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY, "intermediate_size": 2 * HIDDEN, "max_position_embeddings": 4096,
}  # fmt: skip
_OWN = {
    "gemma2": {"num_key_value_heads": 4, "query_pre_attn_scalar": SIZE, "sliding_window": 4096},
    "gpt_oss": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
}


def _modeling(name: str) -> ModuleType:
    from importlib import import_module

    return import_module(f"transformers.models.{name}.modeling_{name}")


def _model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    prefix = {"gemma2": "Gemma2", "gpt_oss": "GptOss"}[name]
    config = getattr(transformers, f"{prefix}Config")(**_CONFIG | _OWN[name], attn_implementation=EAGER)
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(device, dtype)


def _padding(length: int, device: torch.device) -> Tensor:
    """(batch, length): the sequences of a batch end one after the other, the shortest at half the length."""
    batch = BATCH[length]
    ends = length - torch.arange(1, batch + 1, device=device)[:, None] * (length // (2 * batch))
    return torch.arange(length, device=device) < ends


# --- the attention of one layer ---------------------------------------------------------------------------------------


def _build_attention(name: str, kind: str, dtype: torch.dtype, length: int, device: torch.device) -> Workload:
    layer = _model(name, dtype, device).model.layers[0].self_attn
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    heads = (HEADS, *[_OWN[name]["num_key_value_heads"]] * 2)
    shapes = [(BATCH[length], length, number, SIZE) for number in heads]
    leaves = [normal(shape).to(dtype).requires_grad_() for shape in shapes]
    grad = normal(BATCH[length], length, HEADS, SIZE).to(dtype)
    live = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if layer.sliding_window is not None and layer.sliding_window < length:
        live = live.triu(1 - layer.sliding_window)
    if kind == PADDED:
        live = live & _padding(length, device)[:, None, None, :]
    options: dict[str, Any] = {"scaling": layer.scaling, "sliding_window": layer.sliding_window}
    if name == "gemma2":
        options["softcap"] = layer.attn_logit_softcapping

    def call(function: Callable, mask: Tensor | None, module: Any, *tensors: Tensor) -> Tensor:
        transposed = (tensor.transpose(1, 2) for tensor in tensors)
        sinks = {"s_aux": module.sinks} if name == "gpt_oss" else {}
        return function(module, *transposed, mask, **options, **sinks)[0]

    def make(contender: str) -> Contender:
        function: Callable[..., Tensor]
        if contender == OURS:
            windowed = layer.sliding_window is not None and layer.sliding_window <= length
            mask = live if kind == PADDED or windowed else None  # what transformers' mask function gives
            function = partial(call, _transformers.attention_forward, mask, layer)
        else:
            function = partial(call, _modeling(name).eager_attention_forward, _added(live, dtype), layer)
        if contender == COMPILE:
            function = contenders.compiled(function)
        return contenders.forward_backward(function, leaves, [*leaves, *learned(layer)], [grad])

    def learned(module: Any) -> list[Tensor]:
        return [module.sinks] if name == "gpt_oss" else []

    exact, double = [leaf.detach().double().requires_grad_() for leaf in leaves], copy.deepcopy(layer).double()
    out = call(_modeling(name).eager_attention_forward, _added(live, torch.float64), double, *exact)
    gradients = torch.autograd.grad(out, [*exact, *learned(double)], grad.double())
    return Workload(make, [out.detach(), *gradients])


def _added(live: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of eager attention."""
    return torch.zeros(live.shape, dtype=dtype, device=live.device).masked_fill_(~live, torch.finfo(dtype).min)


# --- a training step --------------------------------------------------------------------------------------------------


def _build_step(name: str, dtype: torch.dtype, length: int, device: torch.device) -> Workload:
    model = _model(name, dtype, device)
    tokens = torch.arange(length, device=device)[None] * 7919 % VOCABULARY

    def gradients(model: Any) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = gradients(model)
        optimizer.step()
        return loss

    def make(contender: str) -> Contender:
        own = copy.deepcopy(model)
        if contender == OURS:
            bigmodel.convert(own, norms=False, attention=True)
        elif contender == COMPILE:
            torch.compiler.reset()
            own.compile(dynamic=False)
        optimizer = torch.optim.AdamW(own.parameters(), fused=True)
        return Contender(partial(step, own, optimizer), prepare=partial(own.zero_grad, set_to_none=True))

    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the others know no float64
    return Workload(make, [gradients(exact)])


def _parameter_bytes(name: str, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in _model(name, dtype, torch.device("meta")).parameters()) * dtype.itemsize


# --- the group --------------------------------------------------------------------------------------------------------


def cases(device: str, *, quick: bool = False, sweep: bool = False) -> list[Case]:
    """The cases for a kind of device; the lengths are the same with or without `sweep`."""
    lengths = (QUICK_LENGTH,) if quick else tuple(BATCH)
    kinds = [(kind, length) for kind, length in KINDS if length in lengths and not (quick and kind == PADDED)]
    result = [attention_case(name, *kind, dtype) for name in MODELS for dtype in FLOATS for kind in kinds]
    return result + [step_case(name, dtype, length) for name in MODELS for dtype in FLOATS for length in lengths[:1]]


def attention_case(name: str, kind: str, length: int, dtype: torch.dtype) -> Case:
    shape = (BATCH[length] * HEADS * length, length)
    return Case(
        op=f"{name}_{kind}", mode=BOTH, dtype=dtype, shape=shape, bytes=5 * shape[0] * shape[1] * dtype.itemsize,
        contenders=(OURS, EAGER, COMPILE), build=partial(_build_attention, name, kind, dtype, length),
    )  # fmt: skip


def step_case(name: str, dtype: torch.dtype, length: int) -> Case:
    return Case(
        op=f"{name}_step", mode=BOTH, dtype=dtype, shape=(length, HIDDEN),
        bytes=10 * _parameter_bytes(name, dtype), contenders=(OURS, EAGER, COMPILE),
        build=partial(_build_step, name, dtype, length),
    )  # fmt: skip


def goals(device: str) -> list[Goal]:
    """The attention part >= 1.3 times as fast as eager's, however the process gets its memory."""
    pages_measured = (DEFAULT_PAGES, HUGE_PAGES) if device == "cpu" else (DEFAULT_PAGES,)
    return [
        Goal(f"{name} {kind} {BOTH} against eager, {pages}", pages, attention_case(name, kind, length, dtype).name,
             EAGER, 1.3)
        for pages in pages_measured for name in MODELS for kind, length in KINDS for dtype in FLOATS
    ]  # fmt: skip
