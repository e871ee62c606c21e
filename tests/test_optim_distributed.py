"""Two gloo processes on a CPU: bigmodel.optim under DDP, FSDP2 and DTensor, and its distributed checkpoints."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_distributed import without_cpu_streams
from torch import nn
from torch.testing import assert_close

import bigmodel
from bigmodel.optim import EMA, SGD, Adagrad, AdamW

SHARDED = {"lr": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.9, "amsgrad": True}


def model(dtype=torch.float32):
    """80 x 64: large enough for 8 bits as a whole and not in halves; 9 rows are cut into 5 and 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 9)).to(dtype)


def batch(step, dtype=torch.float32):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(module, optimizer, steps, rank=None, after=lambda: None):
    for step in steps:
        x = batch(step, next(module.parameters()).dtype)
        module(x if rank is None else x.chunk(2)[rank]).float().square().mean().backward()
        optimizer.step()
        after()
        optimizer.zero_grad()


def sharded(dtype=torch.float32):
    from torch.distributed.fsdp import fully_shard

    module = model(dtype)
    for layer in (module[0], module[2], module):
        fully_shard(layer)
    return module


def assert_same_as_whole(module, optimizer, whole, alone, **tolerance):
    for p, q in zip(module.parameters(), whole.parameters(), strict=True):
        assert_close(p.full_tensor(), q.data, **tolerance)
        for name, value in optimizer.state[p].items():
            if name != "step":
                assert value.placements == p.placements and value.device_mesh == p.device_mesh
                value = value.full_tensor()
            assert_close(value, alone.state[q][name], **tolerance)


# --- cases, each run by both processes --------------------------------------------------------------------------------


def ddp(rank):
    """Bucket views as gradients; stochastic rounding has to keep the replicas equal."""
    for dtype, options in ((torch.float32, SHARDED), (torch.bfloat16, {"lr": 0.01, "stochastic_rounding": True})):
        torch.manual_seed(rank)
        module = nn.parallel.DistributedDataParallel(model(dtype), gradient_as_bucket_view=True)
        optimizer = AdamW(module.parameters(), **options)
        train(module, optimizer, range(4), rank)
        for p in module.parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both)
        if dtype is torch.float32:
            whole = model()
            train(whole, AdamW(whole.parameters(), **options), range(4))
            for p, q in zip(module.module.parameters(), whole.parameters(), strict=True):
                assert_close(p, q, rtol=1e-4, atol=1e-5)


def fsdp2(rank):
    module, whole = sharded(), model()
    optimizer, alone = AdamW(module.parameters(), **SHARDED), AdamW(whole.parameters(), **SHARDED)
    train(module, optimizer, range(4), rank, lambda: norms.append(optimizer.grad_norm))
    train(whole, alone, range(4), after=lambda: exact.append(alone.grad_norm))
    assert_close(norms, exact)
    assert type(optimizer.grad_norm) is torch.Tensor
    assert_same_as_whole(module, optimizer, whole, alone, rtol=1e-4, atol=1e-5)
    # the average in place of the weights: what the model computes is what the whole one computes with its average
    weights = [p.full_tensor() for p in module.parameters()]
    with optimizer.ema_weights(), alone.ema_weights(), torch.no_grad():
        assert_close(module(batch(9)), whole(batch(9)), rtol=1e-4, atol=1e-5)
        module.reshard()
    assert all(torch.equal(p.full_tensor(), w) for p, w in zip(module.parameters(), weights, strict=True))
    with torch.no_grad():
        assert_close(module(batch(9)), whole(batch(9)), rtol=1e-4, atol=1e-5)


norms, exact = [], []


def fsdp2_others(rank):
    for make in (lambda p: SGD(p, lr=0.1, momentum=0.9, max_grad_norm=0.1), lambda p: Adagrad(p, skip_nonfinite=True)):
        module, whole = sharded(), model()
        optimizer, alone = make(module.parameters()), make(whole.parameters())
        train(module, optimizer, range(3), rank)
        train(whole, alone, range(3))
        assert_same_as_whole(module, optimizer, whole, alone, rtol=1e-4, atol=1e-5)
    ema, alone = EMA(module, 0.5), EMA(whole, 0.5)
    for average, other in ((ema, module), (alone, whole)):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        average.update()
    for name, value in ema.averages.items():
        assert_close(value.full_tensor(), alone.averages[name], rtol=1e-4, atol=1e-5)


def clip(rank):
    for norm_type in (1.0, 2.0, float("inf")):
        module, whole = sharded(), model()
        module(batch(0).chunk(2)[rank]).square().mean().backward()
        whole(batch(0)).square().mean().backward()
        norm = bigmodel.clip_grad_norm_(module.parameters(), 0.01, norm_type)
        assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 0.01, norm_type))
        for p, q in zip(module.parameters(), whole.parameters(), strict=True):
            assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-7)


def nonfinite_on_one_rank(rank):
    """One shard's infinity has to keep every process from moving, and one process's zeros must not look like DCP's."""
    module = sharded()
    optimizer = AdamW(module.parameters(), lr=0.1, skip_nonfinite=True)
    before = [p.full_tensor().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
        if rank == 1:
            p.grad._local_tensor.fill_(float("inf"))
    optimizer.step()
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(module.parameters(), before, strict=True))
    assert optimizer.skipped_steps.item() == 1
    warm = AdamW(module.parameters(), lr=0.0)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
        if rank == 1:
            p.grad._local_tensor.zero_()
    warm.step()
    assert all(state["step"].item() == 1 for state in warm.state.values())


def grad_scaler(rank):
    """An infinity in one process's shard, in the second of four steps."""
    module, whole = sharded(), model()
    options = {"lr": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.9}
    optimizer, alone = AdamW(module.parameters(), **options), AdamW(whole.parameters(), **options)
    for some, own, place in ((module, optimizer, rank), (whole, alone, None)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            x = batch(step) if place is None else batch(step).chunk(2)[place]
            scaler.scale(some(x).square().mean()).backward()
            grad = next(some.parameters()).grad
            if step == 1 and place != 1:
                (grad if place is None else grad.to_local())[0, 0] = float("inf")
            scaler.step(own)
            scaler.update()
            own.zero_grad()
        assert scaler.get_scale() == 512.0 and own.skipped_steps.item() == 1
    assert_same_as_whole(module, optimizer, whole, alone, rtol=1e-4, atol=1e-5)


def dtensor(rank):
    """A mesh of one dimension with Shard(1), Replicate and partial gradients, beside plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values, grads = [torch.randn(6, 10) for _ in range(4)], [torch.randn(6, 10) for _ in range(4)]
    placements = ([Shard(1)], [Replicate()], [Replicate()], None)
    params = [
        nn.Parameter(v.clone() if p is None else distribute_tensor(v, mesh, p))
        for v, p in zip(values, placements, strict=True)
    ]
    params[0].grad = distribute_tensor(grads[0], mesh, [Replicate()])
    params[1].grad = distribute_tensor(grads[1], mesh, [Replicate()])
    params[2].grad = DTensor.from_local(grads[2] * (0.25, 0.75)[rank], mesh, [Partial()])
    params[3].grad = grads[3]
    whole = [nn.Parameter(v) for v in values]
    for p, g in zip(whole, grads, strict=True):
        p.grad = g
    ours, alone = AdamW(params, lr=0.1, max_grad_norm=0.3), AdamW(whole, lr=0.1, max_grad_norm=0.3)
    ours.step()
    alone.step()
    assert_close(ours.grad_norm, alone.grad_norm)
    for p, q in zip(params, whole, strict=True):
        assert_close(p.full_tensor() if isinstance(p, DTensor) else p, q.data)


def checkpoint(rank):
    """torch.distributed.checkpoint: two steps, a save, new objects, and two more, as four at once; flat and nested."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for dtype, options in (
        (torch.float32, SHARDED),
        (torch.bfloat16, {"lr": 0.01, "ema_decay": 0.9, "master_weights": True}),
        (torch.bfloat16, {"lr": 0.01, "stochastic_rounding": True, "state_dtype": "bfloat16"}),
        (torch.float32, {"lr": 0.01, "state_dtype": "8bit", "ema_decay": 0.9}),
    ):
        for flat in (False, True):
            flags = StateDictOptions(flatten_optimizer_state_dict=flat)
            whole = sharded(dtype)
            optimizer = AdamW(whole.parameters(), **options)
            train(whole, optimizer, range(4), rank)
            first = sharded(dtype)
            stopped = AdamW(first.parameters(), **options)
            train(first, stopped, range(2), rank)
            folder = f"{checkpoint.folder}/{dtype}{flat}{len(options)}"
            weights, states = get_state_dict(first, stopped, options=flags)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
            second = sharded(dtype)
            with torch.no_grad():
                for p in second.parameters():
                    p.mul_(3)
            resumed = AdamW(second.parameters(), **options)
            weights, states = get_state_dict(second, resumed, options=flags)
            dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                set_state_dict(
                    second, resumed, model_state_dict=weights, optim_state_dict=states, options=flags
                )  # fmt: skip
            train(second, resumed, range(2, 4), rank)
            for p, q in zip(second.parameters(), whole.parameters(), strict=True):
                assert torch.equal(p.to_local(), q.to_local()), (options, flat)
                for name, value in resumed.state[p].items():
                    expected = optimizer.state[q][name]
                    value, expected = (t.to_local() if hasattr(t, "to_local") else t for t in (value, expected))
                    assert value.dtype is expected.dtype
                    if not name.endswith("_scale"):  # found again up to a rounding that changes no value
                        assert torch.equal(value, expected), (name, options, flat)


def first_checkpoint(rank):
    """The step with which torch.distributed.checkpoint makes the states changes nothing but that they are there."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for lr in (0.1, torch.tensor(0.1)):
        module = sharded()
        before = [p.full_tensor().clone() for p in module.parameters()]
        optimizer = AdamW(
            module.parameters(), lr=lr, weight_decay=0.5, ema_decay=0.9, max_grad_norm=1.0, skip_nonfinite=True
        )  # fmt: skip
        get_optimizer_state_dict(module, optimizer)
        assert optimizer.grad_norm is None and optimizer.skipped_steps.item() == 0
        for p, value in zip(module.parameters(), before, strict=True):
            state = optimizer.state[p]
            assert torch.equal(p.full_tensor(), value) and torch.equal(state["ema"].full_tensor(), value)
            assert state["step"].item() == 0 and not state["exp_avg"].full_tensor().any()


def reshard(rank):
    """8-bit states of two processes in one, by way of a checkpoint: decoded and encoded, so within a code's width."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    module = sharded()
    optimizer = AdamW(module.parameters(), lr=0.01, state_dtype="8bit")
    train(module, optimizer, range(3), rank)
    weight = module[0].weight
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype is torch.uint8 and state["exp_avg_scale"].numel() == 40 * 64 // 256
    assert optimizer.state[module[2].weight]["exp_avg"].dtype is torch.float32
    states = get_optimizer_state_dict(module, optimizer)
    saved = states["state"]["0.weight"]["exp_avg"].full_tensor()
    dcp.save(states, checkpoint_id=f"{checkpoint.folder}/8bit")

    whole = model()
    alone = AdamW(whole.parameters(), lr=0.01, state_dtype="float32")
    states = get_optimizer_state_dict(whole, alone)
    dcp.load(states, checkpoint_id=f"{checkpoint.folder}/8bit")
    assert_close(states["state"]["0.weight"]["exp_avg"], saved, rtol=0, atol=0)
    for group in states["param_groups"]:
        group["state_dtype"] = "8bit"
    set_optimizer_state_dict(whole, alone, states)
    with torch.no_grad():
        for p, q in zip(whole.parameters(), module.parameters(), strict=True):
            p.copy_(q.full_tensor())
    train(whole, alone, range(3, 5))
    train(module, optimizer, range(3, 5), rank)
    assert alone.state[whole[0].weight]["exp_avg"].dtype is torch.uint8
    assert alone.state[whole[0].weight]["exp_avg_scale"].numel() == 20
    for p, q in zip(whole.parameters(), module.parameters(), strict=True):
        assert (p - q.full_tensor()).abs().max() <= 0.01  # of two steps of at most 0.01 each


# --- the processes ----------------------------------------------------------------------------------------------------


def run(rank, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    checkpoint.folder = folder
    try:
        for case in cases:
            norms.clear()
            exact.clear()
            case(rank)
        dist.barrier()  # a process that leaves first would take the connection from the other
    finally:
        dist.destroy_process_group()
    # Now and then a thread of torch's wants the interpreter while it ends, and aborts ("terminate called").
    os._exit(0)


# Starting two processes takes longer than a case: those of a list share them, and a traceback names the one that fails.


def test_ddp_and_dtensor(tmp_path):
    mp.spawn(run, ([ddp, dtensor], str(tmp_path)), nprocs=2)


@without_cpu_streams
def test_fsdp2_and_its_checkpoints(tmp_path):
    cases = [clip, nonfinite_on_one_rank, grad_scaler, fsdp2, fsdp2_others, checkpoint, first_checkpoint, reshard]
    mp.spawn(run, (cases, str(tmp_path)), nprocs=2)
