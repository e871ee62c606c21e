"""What an optimizer keeps for a parameter: in which format, and how a saved state finds its way back into it.

A moment in 8 bits is two tensors, `<name>` with codes in the parameter's shape and order of memory and `<name>_scale`,
one float32 for 256 codes (csrc/ops/adam.h). Blocks are counted on what this process holds. A sharded state is written
to checkpoints as float32, since scales of blocks that shards begin anew mean nothing after resharding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel import _registry
from bigmodel._native import compute_dtype
from bigmodel.ops._table import QUANT_BLOCK, dense, same_order
from bigmodel.ops.adam import dequantise, dynamic_code, quantise, zero_code
from bigmodel.optim._distributed import is_dtensor, like, local

SMALL = 4096  # elements of the whole parameter, below which a moment is not worth 8 bits
LOW = (torch.bfloat16, torch.float16)
SIGNED = {"exp_avg": True, "exp_avg_sq": False}

_FORMATS: dict[Any, str] = {
    "float32": "float32", torch.float32: "float32",
    "bfloat16": "bfloat16", torch.bfloat16: "bfloat16",
    "8bit": "8bit", torch.uint8: "8bit",
    "param": "param",
}  # fmt: skip


def format_name(owner: str, value: Any) -> str:
    """A state_dtype as it is kept in parameter groups: a string, which every kind of checkpoint can hold."""
    if not isinstance(value, (str, torch.dtype)) or value not in _FORMATS:
        raise ValueError(f"{owner}: state_dtype is {value!r}; supported are 'float32', 'bfloat16', '8bit' and 'param'.")
    return _FORMATS[value]


def wide(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on a parameter."""
    return compute_dtype(param.dtype)


def moment_dtype(param: Tensor, name: str) -> torch.dtype:
    """The dtype of a moment in the format `name`; torch.uint8 for codes."""
    if name == "8bit":
        return torch.uint8 if param.numel() >= SMALL else wide(param)
    return {"float32": wide(param), "bfloat16": torch.bfloat16, "param": param.dtype}[name]


def _fresh(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a state, in huge pages where it is large: a step goes through all of it."""
    value = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    _registry.in_huge_pages(local(value))
    return value


def conform(state: dict, name: str, param: Tensor, dtype: torch.dtype, first: float = 0.0) -> None:
    """Gives state[name] the dtype and its parameter's order of memory, converting what is there.

    Without it, makes it of `first`. Codes in another order are encoded anew, since their scales belong to blocks.
    """
    value = state.get(name)
    if value is None:
        if dtype is torch.uint8:
            state[name] = _fresh(param, dtype).fill_(zero_code(SIGNED[name]))
            blocks = -(-local(param).numel() // QUANT_BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=local(param).device)
        else:
            state[name] = _fresh(param, dtype).fill_(first)
    elif value.dtype is not dtype or not _in_order(value, param):
        if value.dtype is torch.uint8:
            value = decoded(state, name)
            state.pop(f"{name}_scale")
        value = _ordered(value, param)
        if dtype is torch.uint8:
            _encode(state, name, value)
        else:
            state[name] = value.to(dtype)


def copy_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    return _fresh(value.detach(), dtype).copy_(value.detach())


def restored(param: Tensor, name: str, value: Any) -> Any:
    """A saved value on its parameter's device, in the dtype in which it was saved.

    In the parameter's order of memory too, but for 8-bit codes, which `conform` brings into it.
    """
    device = local(param).device
    if name == "step":
        return torch.as_tensor(value, dtype=torch.float32).to(device, copy=True)
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    if is_dtensor(value) and value.placements != param.placements:  # type: ignore[attr-defined]
        value = value.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return value if value.dtype is torch.uint8 else _ordered(value, param)


def _in_order(value: Tensor, param: Tensor) -> bool:
    part, own = local(value), local(param)
    return part.shape != own.shape or same_order(part, own) or not dense(own)


def _ordered(value: Tensor, param: Tensor) -> Tensor:
    """`value`, or a copy in the parameter's order of memory where that is another."""
    if _in_order(value, param):
        return value
    part = local(value)
    copy = torch.empty_like(local(param), dtype=part.dtype, memory_format=torch.preserve_format)
    return like(copy.copy_(part), value)


def decoded(state: dict, name: str) -> Tensor:
    """An 8-bit moment as float32, placed and laid out as its codes."""
    codes = local(state[name])
    value = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    _in_memory(value).copy_(dequantise(_in_memory(codes), state[f"{name}_scale"], SIGNED[name]))
    return like(value, state[name])


def _encode(state: dict, name: str, value: Tensor) -> None:
    part = local(value)
    codes = torch.empty_like(part, dtype=torch.uint8, memory_format=torch.preserve_format)
    flat, scales = _requantise(_in_memory(part).float(), SIGNED[name])
    _in_memory(codes).copy_(flat)
    state[name], state[f"{name}_scale"] = like(codes, value), scales


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in their order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _requantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """`quantise`, for values that may come from `dequantise`: those give their own codes and scales again.

    A block's scale is its largest magnitude, so it is found again where that is positive, and where it is negative up
    to a rounding: the code has 1 and no -1, and the largest became 0.993 of itself. Neighbours of that quotient are
    tried; any with which all values of the block come out is as good as the one before.
    """
    codes, scales = quantise(values, signed)
    if not signed or not values.numel():
        return codes, scales
    code = dynamic_code(True).to(values.device)
    middles = (code[1:] + code[:-1]) / 2
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % QUANT_BLOCK), value=zero_code(True))
    codes = codes.view(-1, QUANT_BLOCK)
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % QUANT_BLOCK)).view(-1, QUANT_BLOCK)
    open_ = (-blocks.amin(1) >= blocks.amax(1)).nonzero().squeeze(1)
    quotient = -blocks[open_].amin(1) / -code[0]
    for scale in (quotient, quotient.nextafter(quotient * 2), quotient.nextafter(quotient / 2)):
        block = blocks[open_]
        tried = torch.bucketize(block / scale.unsqueeze(1), middles)
        found = (code[tried] * scale.unsqueeze(1) == block).all(1)
        scales[open_[found]], codes[open_[found]] = scale[found], tried[found].to(torch.uint8)
    return codes.reshape(-1)[: values.numel()], scales
