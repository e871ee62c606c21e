"""How DTensor may lay out the normalisation ops: (outputs, inputs) for each way to place them on one mesh dimension.

Rows shard freely; normalised dimensions are replicated, and so are the parameters, whose gradients are partial sums.
"""

from __future__ import annotations


def _rows(spec, dims: int):
    """The placements of x and of statistics, which have one dimension more in front."""
    from torch.distributed.tensor import Replicate, Shard

    rows = len(spec.tensor_meta.shape) - dims
    return [(Replicate(), Replicate()), *((Shard(i), Shard(i + 1)) for i in range(rows))]


def forward(input, residual, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    return [
        (
            [x, whole if residual is None else x, statistics],
            [x, None if residual is None else x, None if weight is None else whole, None if bias is None else whole,
             None, *(None for _ in scalars)],
        )
        for x, statistics in _rows(input, dims)
    ]  # fmt: skip


def backward(grad_out, grad_summed, saved, statistics, weight, bias, dims, *scalars):
    from torch.distributed.tensor import Partial, Replicate

    whole = Replicate()
    *_, cast_dtype, wants_weight, wants_bias = scalars
    strategies = []
    for x, rows in _rows(grad_out, dims):
        summed = whole if x == whole else Partial()
        strategies.append((
            [x, whole if cast_dtype is None else x, summed if wants_weight else whole, summed if wants_bias else whole],
            [x, None if grad_summed is None else x, x, rows, None if weight is None else whole,
             None if bias is None else whole, None, *(None for _ in scalars)],
        ))  # fmt: skip
    return strategies
