"""What tells a transformer where a token stands: sinusoids added to the input, and ALiBi's slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel import _check


class SinusoidalPositionalEncoding(torch.nn.Module):
    """Adds to each position its sinusoids (Vaswani et al., arXiv 1706.03762, section 3.5).

        table[pos, 2i] = sin(pos / base^(2i / d_model))        table[pos, 2i + 1] = cos(pos / base^(2i / d_model))

    The table is computed in float64 and kept in `dtype` as a buffer outside the state_dict; the sum is taken in the
    wider dtype of both and rounded to the input's.

    Args:
        d_model: the size of the input's last dimension; it may be odd.
        max_length: the number of positions in the table.
        base: 10000 in the paper.
        batch_first: the input is (..., length, d_model); False: (length, ..., d_model).
        dtype: of the table, float32, bfloat16, float16 or float64; None for torch's default.

    Shapes: input (..., length, d_model) or (length, ..., d_model), output the same.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    table: Tensor

    def __init__(
        self, d_model: int, max_length: int = 4096, *, base: float = 10000.0, batch_first: bool = True, device=None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "SinusoidalPositionalEncoding"
        for name, size in (("d_model", d_model), ("max_length", max_length)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{op}: {name} is {size!r}; it must be a positive integer.")
        if not _check.number(op, "base", base) > 0:
            raise ValueError(f"{op}: base is {base}; it must be greater than 0.")
        _check.flag(op, "batch_first", batch_first)
        if dtype is not None:
            _check.dtype(op, "dtype", dtype)
        self.d_model = d_model
        self.max_length = max_length
        self.base = base
        self.batch_first = batch_first
        self.register_buffer("table", torch.empty(max_length, d_model, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the table: needed after to_empty() only, since it is no part of the state_dict."""
        device = self.table.device
        evens = torch.arange(0, self.d_model, 2, dtype=torch.float64, device=device)
        positions = torch.arange(self.max_length, dtype=torch.float64, device=device)
        angles = positions.unsqueeze(-1) * torch.exp(evens * (-math.log(self.base) / self.d_model))
        self.table[:, 0::2] = angles.sin()
        self.table[:, 1::2] = angles.cos()[:, : self.d_model // 2]

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """The input plus the encodings of positions offset, offset + 1, ...: with a cache, offset is what it holds.

        Raises:
            TypeError: input is no floating-point tensor, or offset no int.
            ValueError: another last dimension than d_model, or positions outside the table.
        """
        name = "SinusoidalPositionalEncoding"
        if not isinstance(input, Tensor) or input.dtype not in _check.DTYPE_CODES:
            what = input.dtype if isinstance(input, Tensor) else _check.kind(input)
            raise TypeError(f"{name}: input must be a tensor of {_check.SUPPORTED}, got {what}.")
        if isinstance(offset, (bool, Tensor)) or not hasattr(offset, "__index__"):
            raise TypeError(f"{name}: offset must be an int, got {_check.kind(offset)}.")
        if input.dim() < 2 or input.shape[-1] != self.d_model:
            order = "(..., length" if self.batch_first else "(length, ..."
            raise ValueError(f"{name}: input has shape {tuple(input.shape)}; accepted is {order}, {self.d_model}).")
        length = input.shape[-2 if self.batch_first else 0]
        if offset < 0 or offset + length > self.max_length:
            raise ValueError(
                f"{name}: input has positions {offset} to {offset + length - 1}, but max_length is {self.max_length}."
            )
        table = self.table[offset : offset + length]
        if not self.batch_first:
            table = table.view(length, *[1] * (input.dim() - 2), self.d_model)
        return (input + table).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_length={self.max_length}, base={self.base:g}, batch_first={self.batch_first}"


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """(num_heads,), float32: ALiBi's slopes (Press, Smith, Lewis, arXiv 2108.12409) for `attention_softmax`.

    For a power of two, head k = 1, 2, ... has 2^(-8 k / num_heads). For other numbers, as in the authors' code: the
    slopes of the power of two below, then every second one of those of the power of two above.

    Raises:
        ValueError: num_heads is not a positive integer.
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads is {num_heads!r}; it must be a positive integer.")
    below = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * k / below for k in range(1, below + 1)]
    exponents += [8 * k / (2 * below) for k in range(1, 2 * below, 2)][: num_heads - below]
    return torch.tensor([2.0**-exponent for exponent in exponents], device=device)
