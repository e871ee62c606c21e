"""Bad input to the normalisation ops: one sentence that names the op and the argument, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bigmodel
from bigmodel import _check, _native

X, W = torch.randn(4, 8), torch.randn(8)

CASES = {
    "input is no tensor": (
        lambda: bigmodel.rms_norm([1.0], 1),
        TypeError,
        "rms_norm: input must be a torch.Tensor, got list",
    ),
    "integer input": (lambda: bigmodel.layer_norm(X.int(), 8), TypeError, "layer_norm: input has dtype torch.int32"),
    "complex input": (lambda: bigmodel.rms_norm(X.cfloat(), 8), TypeError, "rms_norm: input has dtype torch.complex64"),
    "float8 input": (
        lambda: bigmodel.rms_norm(X.to(torch.float8_e4m3fn), 8),
        TypeError,
        "input has dtype torch.float8",
    ),
    "normalized_shape": (
        lambda: bigmodel.rms_norm(X, 7),
        ValueError,
        "normalized_shape (7,) does not match the end of input's shape (4, 8)",
    ),
    "too many dimensions": (
        lambda: bigmodel.rms_norm(X, (2, 4, 8)),
        ValueError,
        "normalized_shape (2, 4, 8) does not match",
    ),
    "empty normalized_shape": (lambda: bigmodel.layer_norm(X, ()), ValueError, "normalized_shape () does not match"),
    "normalized_shape is text": (
        lambda: bigmodel.layer_norm(X, "8"),
        TypeError,
        "normalized_shape must be an int or a sequence of ints",
    ),
    "normalized_shape is a float": (
        lambda: bigmodel.layer_norm(X, 8.0),
        TypeError,
        "normalized_shape must be an int or a sequence of ints",
    ),
    "weight shape": (
        lambda: bigmodel.rms_norm(X, 8, W[:7]),
        ValueError,
        "rms_norm: weight has shape (7,), but normalized_shape is (8,)",
    ),
    "weight is no tensor": (
        lambda: bigmodel.rms_norm(X, 8, 1.0),
        TypeError,
        "rms_norm: weight must be a torch.Tensor, got float",
    ),
    "weight device": (
        lambda: bigmodel.rms_norm(X, 8, W.to("meta")),
        ValueError,
        "weight is on device 'meta', but input is on 'cpu'",
    ),
    "weight too wide": (
        lambda: bigmodel.rms_norm(X, 8, W.double()),
        TypeError,
        "weight is float64, but torch.float32 is normalised",
    ),
    "integer weight": (lambda: bigmodel.rms_norm(X, 8, W.int()), TypeError, "weight has dtype torch.int32"),
    "bias dtype": (
        lambda: bigmodel.layer_norm(X, 8, W, W.half()),
        TypeError,
        "bias has dtype torch.float16, but weight has torch.float32",
    ),
    "bias shape": (lambda: bigmodel.layer_norm(X, 8, None, X), ValueError, "bias has shape (4, 8)"),
    "negative eps": (
        lambda: bigmodel.layer_norm(X, 8, eps=-1e-5),
        ValueError,
        "layer_norm: eps is -1e-05; it must be finite and at least 0",
    ),
    "NaN eps": (lambda: bigmodel.rms_norm(X, 8, eps=float("nan")), ValueError, "rms_norm: eps is nan"),
    "eps is text": (lambda: bigmodel.rms_norm(X, 8, eps="1e-5"), TypeError, "eps must be a number, got str"),
    "eps None for layer_norm": (
        lambda: bigmodel.layer_norm(X, 8, eps=None),
        TypeError,
        "layer_norm: eps must be a number",
    ),
    "weight_offset": (
        lambda: bigmodel.rms_norm(X, 8, W, weight_offset=float("inf")),
        ValueError,
        "weight_offset is inf",
    ),
    "offset without weight": (
        lambda: bigmodel.rms_norm(X, 8, weight_offset=1.0),
        ValueError,
        "weight_offset is 1.0, but there is no weight",
    ),
    "out_dtype": (lambda: bigmodel.rms_norm(X, 8, out_dtype=torch.int8), TypeError, "out_dtype is torch.int8"),
    "out_dtype is text": (
        lambda: bigmodel.rms_norm(X, 8, out_dtype="bf16"),
        TypeError,
        "out_dtype must be a torch.dtype, got 'bf16'; supported are",
    ),
    "memory_efficient": (
        lambda: bigmodel.rms_norm(X, 8, memory_efficient="yes"),
        TypeError,
        "rms_norm: memory_efficient must be a bool, got str",
    ),
    "memory_efficient with a residual": (
        lambda: bigmodel.add_layer_norm(X, X, 8, memory_efficient=1),
        TypeError,
        "add_layer_norm: memory_efficient must be a bool, got int",
    ),
    "huge eps": (lambda: bigmodel.rms_norm(X, 8, eps=10**400), ValueError, "eps is inf; it must be finite and at"),
    "huge fraction as eps": (lambda: bigmodel.rms_norm(X, 8, eps=Fraction(10**400)), ValueError, "eps is inf; it must"),
    "a float in normalized_shape": (
        lambda: bigmodel.rms_norm(X, (8.0,)),
        TypeError,
        "normalized_shape must be an int or a sequence of ints, got (8.0,)",
    ),
    "a bool in normalized_shape": (
        lambda: bigmodel.rms_norm(X[:, :1], (True,)),
        TypeError,
        "normalized_shape must be an int or a sequence of ints, got (True,)",
    ),
    "residual shape": (
        lambda: bigmodel.add_rms_norm(X, W, 8),
        ValueError,
        "add_rms_norm: residual has shape (8,), but input is (4, 8)",
    ),
    "sparse input": (
        lambda: bigmodel.rms_norm(X.to_sparse(), 8),
        TypeError,
        "input must be a dense torch.strided tensor",
    ),
    "no residual": (
        lambda: bigmodel.add_layer_norm(X, None, 8),
        TypeError,
        "add_layer_norm: residual must be a torch.Tensor",
    ),
    "residual dtype": (lambda: bigmodel.add_rms_norm(X, X.int(), 8), TypeError, "residual has dtype torch.int32"),
    "residual device": (lambda: bigmodel.add_rms_norm(X, X.to("meta"), 8), ValueError, "residual is on device 'meta'"),
    "residual_dtype": (
        lambda: bigmodel.add_rms_norm(X, X, 8, residual_dtype=torch.int16),
        TypeError,
        "residual_dtype is torch.int16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_names_the_op_and_the_argument(case):
    call, error, words = CASES[case]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.skipif(hasattr(_native.load(), "cuda"), reason="CUDA was built")
def test_cuda_tensor_where_cuda_was_not_built(monkeypatch):
    """With a fake tensor taken for a real one, since without CUDA there is no real one."""
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
    assert bigmodel.rms_norm(x, 8).is_cuda, "tracing for CUDA needs none"
    monkeypatch.setattr(_check, "is_fake", lambda tensor: False)
    with pytest.raises(ValueError, match="^rms_norm: input is on device 'cuda:0', but CUDA was not built"):
        bigmodel.rms_norm(x, 8)


def test_unknown_instruction_set_is_refused_by_name():
    code = "import torch, bigmodel; bigmodel.rms_norm(torch.ones(2, 2), 2)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BIGMODEL_ISA": "v9"}, capture_output=True, text=True
    )
    assert run.returncode and "BIGMODEL_ISA: 'v9' cannot be used on this processor; usable: " in run.stderr


def test_forced_instruction_set_is_used():
    for isa in _native.load().cpu.isas_usable():
        code = "from bigmodel import _native; print(_native.load().cpu.isa_chosen())"
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "BIGMODEL_ISA": isa}, capture_output=True, text=True
        )
        assert run.stdout.strip() == isa
