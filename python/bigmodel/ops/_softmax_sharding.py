"""How DTensor may lay out the softmax ops: (outputs, inputs) for each way to place them on one mesh dimension.

Keys are replicated. Batches and heads shard freely, but not under dropout, whose elements are counted over the whole
tensor; queries do not, since causal and window count them.
"""

from __future__ import annotations


def softmax_forward(input, *scalars):
    return [([out], [out, *_none(scalars)]) for out in _rows(input)]


def softmax_backward(grad_out, out, *scalars):
    return [([grad], [grad, grad, *_none(scalars)]) for grad in _rows(grad_out)]


def attention_forward(scores, mask, slopes, sinks, seed, *scalars):
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()

    def strategy(place, of_mask, of_heads):
        per_head = [None if values is None else of_heads for values in (slopes, sinks)]
        out = [place, whole if seed is None else place, whole if sinks is None else place]
        inputs = [place, None if mask is None else of_mask, *per_head, None if seed is None else whole]
        return out, [*inputs, *_none(scalars)]

    strategies = [strategy(whole, whole, whole)]
    dims = len(scores.tensor_meta.shape)
    for dim in range(dims - 2) if seed is None else ():
        shape = () if mask is None else mask.tensor_meta.shape
        own = dim - dims + len(shape)
        sharded = own >= 0 and shape[own] > 1
        strategies.append(
            strategy(Shard(dim), Shard(own) if sharded else whole, Shard(0) if dim == dims - 3 else whole)
        )
    return strategies


def attention_backward(grad_out, saved, scores, sink_probs, seed, *scalars):
    from torch.distributed.tensor import Partial, Replicate, Shard

    *_, mask_shape, wants_sinks = scalars
    whole = Replicate()

    def strategy(place, of_sinks):
        inputs = [place, place, None if scores is None else place, None if sink_probs is None else place]
        inputs.append(None if seed is None else whole)
        return [place, whole, of_sinks if wants_sinks else whole], [*inputs, *_none(scalars)]

    strategies = [strategy(whole, whole)]
    dims = len(saved.tensor_meta.shape)
    # A mask's gradient takes the mask's whole shape as an argument, which no shard has.
    for dim in range(dims - 2) if seed is None and mask_shape is None else ():
        strategies.append(strategy(Shard(dim), Shard(0) if dim == dims - 3 else Partial()))
    return strategies


def _rows(spec):
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(dim) for dim in range(len(spec.tensor_meta.shape) - 1))]


def _none(scalars):
    return (None for _ in scalars)
