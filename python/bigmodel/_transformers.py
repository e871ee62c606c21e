"""transformers' attention through `bigmodel.attention`, under the name "bigmodel" in its attention interface.

transformers takes two things by that name: the function that attends, and the one that makes its mask. With the first
alone it passes no mask at all, and padding, windows and packed sequences are silently forgotten. The mask is the one
for torch's scaled_dot_product_attention: bool, True takes part, and None where causality, or nothing, is all there is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from bigmodel._attention import attention

NAME = "bigmodel"
_RECORD = "fused_attention_from"


def attention_forward(
    module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
    position_bias: Tensor | None = None, cache: Any = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers calls: (batch, queries, heads, size) and the weights, or None where nobody asks for them.

    A mask holds all that there is, causality and sliding window included. None means causal if `is_causal` (else
    `module.is_causal`) says so and there is more than one query; with more keys than queries these are the first ones
    of a static cache that was empty, whose other keys have not been written.
    """
    if cache is not None:
        raise ValueError(
            f"attention {NAME!r}: cache is a {type(cache).__name__} of continuous batching, which this attention does "
            "not read; set the model's attention to 'sdpa' for that."
        )
    queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = queries > 1 and attention_mask is None and bool(is_causal)
    window = None
    if causal:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
        if sliding_window is not None and queries > sliding_window:
            window = (sliding_window - 1, None)
    wanted = _weights_wanted(kwargs)
    result = attention(
        query, key, value, _with_bias(attention_mask, position_bias), dropout if module.training else 0.0, causal,
        scaling, key.shape[1] != query.shape[1], softcap=softcap, sinks=s_aux, window=window, return_weights=wanted,
    )  # fmt: skip
    out, weights = result if wanted else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for output_attentions: as an argument, or of the hooks that collect them."""
    if kwargs.get("output_attentions"):
        return True
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)  # since GPT-2 drops the argument on the way
    if collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in key for key in collector.get() or ())


# --- setting a model to it --------------------------------------------------------------------------------------------


class _Record(dict):
    """What a model's configs said before, by path; whoever unpickles it has the name registered."""

    def __reduce__(self) -> Any:
        return _recorded, (dict(self),)


def _recorded(before: dict[str, str]) -> _Record:
    register()
    return _Record(before)


def register() -> None:
    """Makes "bigmodel" known to transformers, for set_attn_implementation and from_pretrained too."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise RuntimeError(f"convert: attention=True needs transformers >= 5, this is {transformers.__version__}.")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_model(module: Module) -> bool:
    """Whether it is a model of transformers, which is not imported for the answer."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def implementation(model: Module) -> str:
    return model.config._attn_implementation  # type: ignore[union-attr,return-value]


def attend(model: Any) -> bool:
    """Sets a model of transformers and the models in it to "bigmodel"; False if it cannot be set.

    What each was set to is recorded on it.
    """
    register()
    parts = [part for part in model.modules() if is_model(part)]
    before = [_Record(_implementations(part.config)) for part in parts]
    if implementation(model) != NAME and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    for part, record in zip(parts, before, strict=True):
        if implementation(part) == NAME != record[""]:
            setattr(part, _RECORD, record)
    return implementation(model) == NAME


def recorded(model: Module) -> str | None:
    """What the model was set to before `attend`; None if it was not set by it."""
    record = vars(model).get(_RECORD)
    return None if record is None else record[""]


def revert(model: Any) -> None:
    """Takes back `attend` for one model, except where something else has been set since."""
    for path, before in vars(model).pop(_RECORD).items():
        config = model.config
        for key in filter(None, path.split(".")):
            config = getattr(config, key)
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = before  # the public setter sets the configs in it too


def _implementations(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, attention) of a config, whose own path is empty, and of those in it."""
    yield path, config._attn_implementation
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _implementations(inner, f"{path}.{key}" if path else key)
