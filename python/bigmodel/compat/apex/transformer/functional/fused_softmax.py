"""apex.transformer.functional.fused_softmax: scale, mask and softmax over bigmodel's attention softmax.

    softmax(scale * inputs) over the last dimension, of the entries that are not masked

for inputs (batch, heads, queries, keys) of any size, float32, bfloat16, float16 and float64, on CPU and CUDA; the
output has the inputs' shape and dtype. A mask is bool (True is masked out) or uint8 (1 is masked out), and broadcasts
to the inputs. Masked entries are exactly 0, and a row without any other is all 0. Under autocast the inputs are first
cast to the autocast dtype, as apex does. TypeError and ValueError are those of bigmodel.attention_softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigmodel.compat.apex._absent import attributes_of
from bigmodel.compat.apex._autocast_utils import _cast_if_autocast_enabled
from bigmodel.compat.apex.normalization.fused_layer_norm import _Function
from bigmodel.compat.apex.transformer.enums import AttnMaskType
from bigmodel.ops import attention_softmax

__all__ = [
    "FusedScaleMaskSoftmax",
    "GenericFusedScaleMaskSoftmax",
    "GenericScaledMaskedSoftmax",
    "ScaledMaskedSoftmax",
    "ScaledSoftmax",
    "ScaledUpperTriangMaskedSoftmax",
    "generic_scaled_masked_softmax",
    "scaled_masked_softmax",
    "scaled_upper_triang_masked_softmax",
]
__getattr__ = attributes_of(__name__)

_MASK_DTYPES = (torch.bool, torch.uint8)


def _taking_part(name: str, mask: Tensor | None) -> Tensor | None:
    """apex's mask turned into attention_softmax's, where True takes part."""
    if mask is None:
        return None
    if mask.dtype not in _MASK_DTYPES:
        raise TypeError(
            f"{name}: mask has dtype {mask.dtype}; accepted are bool (True is masked out) and uint8 (1 is)."
        )
    return ~mask if mask.dtype is torch.bool else mask != 1


def _check(name: str, inputs: Tensor, mask: Tensor | None = None) -> None:
    for argument, value in (("inputs", inputs), ("mask", mask)):
        if not isinstance(value, Tensor) and not (argument == "mask" and value is None):
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}.")
    if inputs.dim() != 4:
        raise ValueError(f"{name}: inputs has shape {tuple(inputs.shape)}; accepted is (batch, heads, queries, keys).")


# --- names of apex's autograd Functions -------------------------------------------------------------------------------


class ScaledUpperTriangMaskedSoftmax(_Function):
    """Causal; inputs (batch * heads, queries, keys)."""

    @staticmethod
    def forward(ctx, inputs: Tensor, scale: float) -> Tensor:
        return attention_softmax(inputs, scale=scale, causal=True)


class ScaledMaskedSoftmax(_Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
        return attention_softmax(inputs, scale=scale, mask=_taking_part("scaled_masked_softmax", mask))


class GenericScaledMaskedSoftmax(_Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
        return attention_softmax(inputs, scale=scale, mask=_taking_part("generic_scaled_masked_softmax", mask))


class ScaledSoftmax(_Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, scale: float) -> Tensor:
        return attention_softmax(inputs, scale=scale)


# --- functions --------------------------------------------------------------------------------------------------------


def scaled_upper_triang_masked_softmax(inputs: Tensor, _: object, scale: float) -> Tensor:
    """Causal, aligned at the bottom right where queries != keys; the second argument is not read, as in apex."""
    _check("scaled_upper_triang_masked_softmax", inputs)
    return ScaledUpperTriangMaskedSoftmax.apply(*_cast_if_autocast_enabled(inputs, scale))


def scaled_masked_softmax(inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """With a mask, or with None for none."""
    _check("scaled_masked_softmax", inputs, mask)
    if mask is None:
        return ScaledSoftmax.apply(*_cast_if_autocast_enabled(inputs, scale))
    return ScaledMaskedSoftmax.apply(*_cast_if_autocast_enabled(inputs, mask, scale))


def generic_scaled_masked_softmax(inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same as `scaled_masked_softmax`, which here has no limits of size either."""
    _check("generic_scaled_masked_softmax", inputs, mask)
    return GenericScaledMaskedSoftmax.apply(*_cast_if_autocast_enabled(inputs, mask, scale))


# --- modules ----------------------------------------------------------------------------------------------------------


class FusedScaleMaskSoftmax(torch.nn.Module):
    """Scale, mask and softmax of attention scores.

    Args:
        input_in_fp16, input_in_bf16: the dtype to return where mask_func is applied; never both.
        attn_mask_type: AttnMaskType.padding or .causal. Fused, causal and a mask hold together.
        scaled_masked_softmax_fusion: False applies mask_func to the scores instead, and torch's softmax.
        mask_func: f(scores, mask) -> scores; called without fusion, and for masks of another dtype than bool or uint8.
        softmax_in_fp32: where mask_func is applied, convert to float32 before it; fused, the arithmetic always is.
        scale: None for 1; needs softmax_in_fp32.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: AttnMaskType,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor],
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise RuntimeError("FusedScaleMaskSoftmax: input_in_fp16 and input_in_bf16 are both True; one may be.")
        if scale is not None and not softmax_in_fp32:
            raise RuntimeError("FusedScaleMaskSoftmax: softmax_in_fp32 is False, but a scale needs it.")
        if not isinstance(attn_mask_type, AttnMaskType):
            raise ValueError(
                f"FusedScaleMaskSoftmax: attn_mask_type is {attn_mask_type!r}; accepted are AttnMaskType's padding and "
                "causal."
            )
        self.input_in_fp16 = input_in_fp16
        self.input_in_bf16 = input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        _check("FusedScaleMaskSoftmax", input, mask)
        if self.is_kernel_available(mask, *input.shape):
            return self.forward_fused_softmax(input, mask)
        return self.forward_torch_softmax(input, mask)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """Whether the fused softmax is taken: for every size, and wherever there is nothing for mask_func to do."""
        return mask is None or bool(self.scaled_masked_softmax_fusion and mask.dtype in _MASK_DTYPES)

    def forward_fused_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        scale = 1.0 if self.scale is None else self.scale
        causal = self.attn_mask_type is AttnMaskType.causal
        taking_part = _taking_part("FusedScaleMaskSoftmax", mask)
        (input,) = _cast_if_autocast_enabled(input)
        with torch.autocast(input.device.type, enabled=False):
            return attention_softmax(input, scale=scale, mask=taking_part, causal=causal)

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        widened = self.input_in_float16 and self.softmax_in_fp32
        scores = input.float() if widened else input
        if self.scale is not None:
            scores = scores * self.scale
        probs = torch.softmax(scores if mask is None else self.mask_func(scores, mask), -1)
        if widened:
            probs = probs.to(torch.float16 if self.input_in_fp16 else torch.bfloat16)
        return probs


class GenericFusedScaleMaskSoftmax(FusedScaleMaskSoftmax):
    """FusedScaleMaskSoftmax with AttnMaskType.padding; in apex the one without limits of size, here the same."""

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor],
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__(
            input_in_fp16,
            input_in_bf16,
            AttnMaskType.padding,
            scaled_masked_softmax_fusion,
            mask_func,
            softmax_in_fp32,
            scale,
        )
