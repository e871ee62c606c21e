"""The peers as the benchmark calls them, on modules with their signatures that compute with torch.

Signatures: liger-kernel 0.8.5, quack-kernels 0.6.5, apex 25.09, flash-attn 2.8, transformer-engine 2.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from bigmodel.benchmarks import adam, harness, norm, softmax
from bigmodel.benchmarks.harness import COPY, OURS, CpuTimer, Effort

BRIEF = Effort(seconds=0.0, min_rounds=1, max_rounds=1)
SHAPE = (6, 64)


def rms(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return rms(X, W, eps)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return rms(X + R, W, eps), X + R


def quack_rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
    weight_offset=0.0,
):  # fmt: skip
    total = x if residual is None else x + residual
    return (rms(total, weight, eps), total) if prenorm else rms(total, weight, eps)


def flash_norm(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False,
):  # fmt: skip
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return quack_rmsnorm(x, weight, residual=residual, eps=eps, prenorm=prenorm)


def apex_rms(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input, normalized_shape, weight, eps)


def apex_layer(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


class ApexAdam(torch.optim.AdamW):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)


class TransformerEngineAdam(torch.optim.AdamW):
    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *, bias_correction=True,
        adam_w_mode=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)


STUBS = {
    "liger_kernel.transformers.functional": {
        "liger_rms_norm": liger_rms_norm,
        "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        "liger_fused_add_rms_norm": liger_fused_add_rms_norm,
        "liger_softmax": lambda x: torch.softmax(x, -1),
    },
    "quack": {"rmsnorm": quack_rmsnorm, "softmax": lambda x: torch.softmax(x, -1)},
    "apex.normalization.fused_layer_norm": {
        "fused_rms_norm_affine": apex_rms,
        "fused_layer_norm_affine": apex_layer,
    },
    "flash_attn.ops.triton.layer_norm": {"rms_norm_fn": flash_norm, "layer_norm_fn": flash_norm},
    "apex.optimizers": {"FusedAdam": ApexAdam},
    "transformer_engine.pytorch": {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm},
    "transformer_engine.pytorch.optimizers": {"FusedAdam": TransformerEngineAdam},
}


@pytest.fixture
def peers(monkeypatch):
    made = {}
    for path, names in STUBS.items():
        parts = path.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if name not in made:
                made[name] = ModuleType(name)
                monkeypatch.setitem(sys.modules, name, made[name])
            if i:
                setattr(made[".".join(parts[:i])], parts[i], made[name])
        vars(made[path]).update(names)


def measured(module, op, mode, names):
    case = module._case("cpu", op, mode, torch.float32, SHAPE)
    workload = case.build(torch.device("cpu"))
    case = harness.replace(case, contenders=(OURS, *names), build=lambda device: workload)
    return harness.measure(case, CpuTimer(), BRIEF)


@pytest.mark.parametrize("mode", [norm.FORWARD, norm.BACKWARD])
@pytest.mark.parametrize("op", norm.OPS)
def test_every_peer_of_the_norms_computes_the_case(peers, op, mode):
    names = [name for name, (_, ops, _) in norm.PEERS.items() if op in ops]
    row = measured(norm, op, mode, names)
    assert row.notes == {} and set(row.times) == {OURS, COPY, *names}


def test_every_peer_of_softmax_computes_the_case(peers):
    row = measured(softmax, softmax.PLAIN, softmax.BOTH, softmax.PEERS)
    assert row.notes == {} and set(row.times) == {OURS, COPY, *softmax.PEERS}


def test_every_peer_of_adam_on_a_gpu_computes_the_case(peers, monkeypatch):
    monkeypatch.setattr(adam._updates.importlib.util, "find_spec", lambda name: name in ("apex", "transformer_engine"))
    names = adam._contenders(adam.STEP, "cuda", SHAPE)
    assert names[-2:] == ("apex", "transformer_engine")
    case = harness.replace(adam._case("cpu", adam.STEP, torch.float32, SHAPE), contenders=names)
    row = harness.measure(case, CpuTimer(), BRIEF)
    assert row.notes == {} and set(row.times) == {*names, COPY}


def test_a_peer_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack", None)
    row = measured(norm, "rms_norm", norm.FORWARD, ["quack"])
    assert set(row.times) == {OURS, COPY}
    assert row.notes["quack"].startswith("not timed: ModuleNotFoundError")
