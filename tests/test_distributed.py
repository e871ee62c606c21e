"""Two gloo processes on a CPU: DDP, FSDP2 and DTensor give what one process gives."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

import bigmodel


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bigmodel.nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.last = bigmodel.nn.RMSNorm(32)

    def forward(self, x):
        return self.last(self.up(self.norm(x)))


def one_process():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(8, 16)
    block(x).square().mean().backward()
    return block, x


def ddp(rank):
    expected, x = one_process()
    torch.manual_seed(0)
    block = nn.parallel.DistributedDataParallel(Block())
    block(x.chunk(2)[rank]).square().mean().backward()
    for ours, whole in zip(block.module.parameters(), expected.parameters(), strict=True):
        assert_close(ours.grad, whole.grad)


def fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    expected, x = one_process()
    torch.manual_seed(0)
    block = Block()
    for layer in (block.norm, block.up, block.last, block):
        fully_shard(layer)
    block(x.chunk(2)[rank]).square().mean().backward()
    for ours, whole in zip(block.parameters(), expected.parameters(), strict=True):
        assert_close(ours.grad.full_tensor(), whole.grad)


def dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, other, weight = torch.randn(8, 6, 16), torch.randn(8, 6, 16), torch.randn(16)
    for dim in (0, 1, 2):  # sharded over the normalised dimension, the rows have to be gathered first
        plain = [t.clone().requires_grad_() for t in (x, other, weight)]
        spread = [
            distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_(),
            distribute_tensor(other, mesh, [Shard(dim)]).requires_grad_(),
            distribute_tensor(weight, mesh, [Replicate()]).requires_grad_(),
        ]
        results = []
        for a, r, w in (plain, spread):
            normed, summed = bigmodel.add_rms_norm(a, r, 16, w, 1e-5)
            again = bigmodel.layer_norm(normed, 16, w, w, 1e-5)
            (again.square().sum() + summed.sum()).backward()
            results.append((again, a.grad, r.grad, w.grad))
        for ours, whole in zip(results[1], results[0], strict=True):
            assert_close(ours.full_tensor(), whole)
        if dim < 2:
            assert results[1][0].placements == (Shard(dim),), "rows must not be gathered"


def dtensor_softmax(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    scores, mask, sinks = torch.randn(4, 2, 6, 8), torch.randn(2, 6, 8), torch.randn(2)
    for dim in range(4):  # queries and keys have to be gathered first
        plain = [t.clone().requires_grad_() for t in (scores, sinks)]
        spread = [
            distribute_tensor(scores, mesh, [Shard(dim)]).requires_grad_(),
            distribute_tensor(sinks, mesh, [Replicate()]).requires_grad_(),
        ]
        results = []
        for (s, k), m in ((plain, mask), (spread, distribute_tensor(mask, mesh, [Replicate()]))):
            out = bigmodel.attention_softmax(s, mask=m, sinks=k, causal=True, softcap=3.0)
            again = bigmodel.log_softmax(out * 3)
            again.square().sum().backward()
            results.append((again, s.grad, k.grad))
        for ours, whole in zip(results[1], results[0], strict=True):
            assert_close(ours.full_tensor(), whole)
        if dim < 2:
            assert results[1][0].placements == (Shard(dim),), "batches and heads must not be gathered"
    for dim in range(4):
        results = []
        for s in (scores.clone(), distribute_tensor(scores, mesh, [Shard(dim)])):
            torch.manual_seed(1)
            s.requires_grad_()
            out = bigmodel.attention_softmax(s, causal=True, dropout_p=0.5)
            out.square().sum().backward()
            results.append((out, s.grad))
        for ours, whole in zip(results[1], results[0], strict=True):
            assert_close(ours.full_tensor(), whole)


def run(rank, case, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        case(rank)
        dist.barrier()  # a process that leaves first would take the connection from the other
    finally:
        dist.destroy_process_group()
    # A thread of gloo's that lets go of a tensor while the interpreter ends asks for it and aborts ("terminate called
    # without an active exception"): pytorch issues 38228 and 190489. Without this package 1 run of 8 did.
    os._exit(0)


without_cpu_streams = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 needs CUDA (2.6 does, 2.13 does not)"
)


@pytest.mark.parametrize(
    "case", [ddp, pytest.param(fsdp2, marks=without_cpu_streams), dtensor, dtensor_softmax], ids=lambda c: c.__name__
)
def test_two_processes(case, tmp_path):
    mp.spawn(run, (case, tmp_path / "store"), nprocs=2)
