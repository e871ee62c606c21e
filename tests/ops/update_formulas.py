"""The multi-tensor ops row by row in torch's own ops: what the kernels are tested against.

Arguments as the bodies in ops/*.py take them. Stochastic rounding is left out: a seed is refused.
"""

from __future__ import annotations

import torch

from bigmodel.ops.adam import dequantise, quantise


def _wide(param):
    return torch.float64 if param.dtype is torch.float64 else torch.float32


def _at(tensors, row):
    return tensors[row] if tensors else None


def _gradient(grad, dtype, factor, grad_scale, maximize):
    g = grad.to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(dtype)
    if factor is not None:
        g = g * factor.to(dtype)
    return -g if maximize else g


def _state(values, scales, signed, dtype):
    return dequantise(values, scales, signed) if values.dtype is torch.uint8 else values.to(dtype)


def _store(values, scales, signed, new):
    if values.dtype is torch.uint8:
        codes, new_scales = quantise(new.float(), signed)
        values.copy_(codes)
        scales.copy_(new_scales)
    else:
        values.copy_(new)


@torch.no_grad()
def adam(
    params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, masters, emas, exp_avg_scales, exp_avg_sq_scales,
    lr_tensor, grad_factor, grad_scale, found_inf,
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize, ema_decay, seed, cache=None,
):  # fmt: skip
    assert seed is None
    if found_inf is not None and found_inf != 0:
        return
    lr = lr if lr_tensor is None else lr_tensor.item()
    for row, param in enumerate(params):
        dtype = _wide(param)
        master, ema, largest = _at(masters, row), _at(emas, row), _at(max_exp_avg_sqs, row)
        m_scale, v_scale = _at(exp_avg_scales, row), _at(exp_avg_sq_scales, row)
        steps[row] += 1
        step = steps[row].item()
        w = (param if master is None else master).to(dtype)
        g = _gradient(grads[row], dtype, grad_factor, grad_scale, maximize)
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
        m = _state(exp_avgs[row], m_scale, True, dtype)
        v = _state(exp_avg_sqs[row], v_scale, False, dtype)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        s = v if largest is None else torch.maximum(largest.to(dtype), v)
        w = w - lr / (1 - beta1**step) * m / (s.sqrt() / (1 - beta2**step) ** 0.5 + eps)
        _store(exp_avgs[row], m_scale, True, m)
        _store(exp_avg_sqs[row], v_scale, False, v)
        if largest is not None:
            largest.copy_(s)
        if master is not None:
            master.copy_(w)
        if ema is not None:
            ema.copy_(ema.to(dtype) + (1 - ema_decay) * (w - ema.to(dtype)))
        param.copy_(w)


@torch.no_grad()
def sgd(
    params, grads, momentum_buffers, started, lr_tensor, grad_factor, grad_scale, found_inf,
    lr, momentum, dampening, weight_decay, nesterov, maximize, cache=None,
):  # fmt: skip
    if found_inf is not None and found_inf != 0:
        return
    lr = lr if lr_tensor is None else lr_tensor.item()
    for row, param in enumerate(params):
        dtype = _wide(param)
        g = _gradient(grads[row], dtype, grad_factor, grad_scale, maximize) + weight_decay * param.to(dtype)
        buffer, begun = _at(momentum_buffers, row), _at(started, row)
        if buffer is not None:
            first = begun is not None and begun == 0
            new = g if first else momentum * buffer.to(dtype) + (1 - dampening) * g
            buffer.copy_(new)
            if begun is not None:
                begun.fill_(1)
            g = g + momentum * new if nesterov else new
        param.copy_(param.to(dtype) - lr * g)


@torch.no_grad()
def adagrad(
    params, grads, sums, steps, lr_tensor, grad_factor, grad_scale, found_inf,
    lr, lr_decay, weight_decay, eps, maximize, cache=None,
):  # fmt: skip
    if found_inf is not None and found_inf != 0:
        return
    lr = lr if lr_tensor is None else lr_tensor.item()
    for row, param in enumerate(params):
        dtype = _wide(param)
        steps[row] += 1
        g = _gradient(grads[row], dtype, grad_factor, grad_scale, maximize) + weight_decay * param.to(dtype)
        total = sums[row].to(dtype) + g * g
        sums[row].copy_(total)
        rate = lr / (1 + (steps[row].item() - 1) * lr_decay)
        param.copy_(param.to(dtype) - rate * g / (total.sqrt() + eps))


@torch.no_grad()
def ema(averages, values, decay, cache=None):
    for average, value in zip(averages, values, strict=True):
        wide = torch.float64 if torch.float64 in (average.dtype, value.dtype) else torch.float32
        average.copy_(average.to(wide) + (1 - decay) * (value.to(wide) - average.to(wide)))


def total(grads, norm_type, cache=None):
    parts = [g.double().abs() for g in grads if g.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    if norm_type == float("inf"):
        return torch.stack([part.max() for part in parts]).max()
    return torch.stack([(part**norm_type).sum() for part in parts]).sum()


def clip(total, grad_scale, found_inf, skipped, max_norm, norm_type, skip_nonfinite, norm_dtype):
    norm = total if norm_type == float("inf") else total ** (1 / norm_type)
    if grad_scale is not None:
        norm = norm / grad_scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    skip = torch.tensor(False) if found_inf is None else found_inf != 0
    if skip_nonfinite:
        skip = skip | ~norm.isfinite()
    if skipped is not None:
        skipped += skip
    return norm.to(norm_dtype), factor.float(), skip.float()


@torch.no_grad()
def scale(grads, factor, cache=None):
    for grad in grads:
        grad.copy_(grad.to(_wide(grad)) * factor.to(_wide(grad)))
