"""Large CPU outputs: the same tensors as torch.empty's, in memory that outlives them."""

import copy
import gc
import io
import mmap
import os
import subprocess
import sys
import threading

import pytest
import torch

import bigmodel
from bigmodel import _memory

SHAPE = (1024, 1024)  # float32: _memory.LARGE bytes


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    bigmodel.release_memory()
    _memory._peak = 0
    yield
    bigmodel.release_memory()


def kept_bytes():
    _memory._collect_dead()
    return _memory._kept_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2048, 1024), (3, 5, 2**20 + 7), (2**22 + 1,)])
def test_a_tensor_like_any_other(shape, dtype):
    tensor = _memory.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype is dtype
    assert tensor.is_contiguous() and not tensor._is_view() and not tensor.requires_grad
    assert tensor.data_ptr() % 4096 == 0
    tensor.fill_(2)
    assert tensor.double().sum() == 2 * tensor.numel()


def test_memory_returns_with_the_last_view_and_serves_the_next():
    tensor = _memory.empty(SHAPE, torch.float32)
    address, row = tensor.data_ptr(), tensor[5]
    row.fill_(3)
    del tensor
    assert kept_bytes() == 0
    other = _memory.empty(SHAPE, torch.float32)
    assert other.data_ptr() != address
    other.fill_(4)
    assert row.eq(3).all()
    del row
    assert kept_bytes() == _memory.LARGE
    assert _memory.empty(SHAPE, torch.float32).data_ptr() == address


def test_nearly_equal_sizes_share_a_block_and_others_do_not():
    address = _memory.empty((1000, 40_000), torch.float32).data_ptr()
    assert _memory.empty((1001, 40_000), torch.float32).data_ptr() == address
    assert _memory.empty((2000, 40_000), torch.float32).data_ptr() != address
    for size in (_memory.LARGE, _memory.LARGE + 1, 10**7, 10**8, 2**33 - 1, 2**33 + 1):
        assert size <= _memory._block_size(size) <= size + max(size // 8, 2 << 20)


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(_memory, "_LIMIT", 3 * _memory.LARGE)
    tensors = [_memory.empty(SHAPE, torch.float32) for _ in range(4)]
    del tensors
    assert kept_bytes() == 3 * _memory.LARGE
    larger = _memory.empty((2, *SHAPE), torch.float32)
    del larger
    assert kept_bytes() == 3 * _memory.LARGE
    assert {size: len(blocks) for size, blocks in _memory._free.items()} == {_memory.LARGE: 1, 2 * _memory.LARGE: 1}


def test_no_more_is_kept_than_was_in_use_at_one_time():
    for factor in range(1, 9):
        _memory.empty((factor, *SHAPE), torch.float32)
    assert kept_bytes() == 8 * _memory.LARGE
    bigmodel.release_memory()
    assert kept_bytes() == 0


def test_an_address_space_limit_is_left_for_others(monkeypatch):
    monkeypatch.setattr(_memory.resource, "getrlimit", lambda which: (1 << 30, 1 << 30))
    assert _memory._limit() == 1 << 28


def test_without_memory_torch_speaks(monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    kept = _memory.empty(SHAPE, torch.float32)
    del kept
    monkeypatch.setattr(_memory.mmap, "mmap", refuse)
    with torch.device("meta"):
        tensor = _memory.empty((2, *SHAPE), torch.float32)
    assert tensor.shape == (2, *SHAPE) and tensor.is_cpu
    assert kept_bytes() == 0, "what was kept is given back first"


def test_a_system_that_cannot_mark_blocks_keeps_none(monkeypatch):
    class Old(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(_memory.mmap, "mmap", Old)
    tensor = _memory.empty(SHAPE, torch.float32).fill_(1)
    assert tensor.sum() == 2**20
    del tensor
    assert kept_bytes() == 0


def test_outputs_of_ops_come_from_it_and_behave():
    x = torch.randn(SHAPE, requires_grad=True)
    out = bigmodel.layer_norm(x, SHAPE[-1:])
    expected = out.detach().clone()
    buffer = io.BytesIO()
    torch.save(out.detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), expected)
    assert torch.equal(copy.deepcopy(out.detach()), expected)
    assert torch.equal(torch.from_numpy(out.detach().numpy()), expected)
    address = out.data_ptr()
    del out
    gc.collect()  # torch 2.6 leaves a cycle behind
    assert kept_bytes() == _memory.LARGE
    out = bigmodel.layer_norm(x, SHAPE[-1:])
    assert out.data_ptr() == address
    assert torch.equal(out.detach().share_memory_(), expected)


def test_in_place_changes_of_an_output_are_seen_by_autograd():
    x = torch.randn(SHAPE, requires_grad=True)
    bigmodel.rms_norm(x, SHAPE[-1:]).mul_(2).sum().backward()
    doubled, x.grad = x.grad, None
    bigmodel.rms_norm(x, SHAPE[-1:]).sum().backward()
    torch.testing.assert_close(doubled, 2 * x.grad)
    with torch.inference_mode():
        assert bigmodel.rms_norm(x, SHAPE[-1:]).is_inference()


def test_a_block_is_never_given_out_twice():
    """A profiler's Python code runs between any two steps: a tensor dies just before a block is taken from its list."""
    spare = [_memory.empty(SHAPE, torch.float32) for _ in range(4)]
    del spare[0]
    live = []

    def profile(frame, event, argument):
        if frame.f_code is _memory._take.__code__ and event == "c_call" and argument.__name__ == "pop" and spare:
            spare.pop()
            _memory._collect_dead()

    sys.setprofile(profile)
    try:
        live += [_memory.empty(SHAPE, torch.float32) for _ in range(8)]
    finally:
        sys.setprofile(None)
    assert len({tensor.data_ptr() for tensor in live}) == 8


def test_an_interrupt_during_backward_is_not_lost():
    script = """
import signal, sys, time, torch, bigmodel
class Stop(Exception): pass
def stop(*_): raise Stop
signal.signal(signal.SIGALRM, stop)
x = torch.randn(4096, 1024, requires_grad=True)
w = torch.randn(1024, 1024, requires_grad=True)
grad = torch.randn(4096, 1024)
def step():  # a long product in C++, after which it drops our output
    (bigmodel.rms_norm(x, 1024) @ w).backward(grad)
    x.grad = w.grad = None
step()
start = time.time()
step()
duration = time.time() - start
for i in range(30):
    try:
        signal.setitimer(signal.ITIMER_REAL, duration * (1 + i / 15))
        end = time.time() + 10 * duration + 2
        while time.time() < end:
            step()
        sys.exit("an interrupt was lost")
    except Stop:
        pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_tensors_that_die_on_other_threads_at_once():
    def work(seed):
        for i in range(50):
            tensor = _memory.empty((1 + i % 3, *SHAPE), torch.float32)
            tensor[:, 0].fill_(seed)
            assert tensor[:, 0].eq(seed).all()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _memory._collect_dead()
    addresses = [id(block) for blocks in _memory._free.values() for block in blocks]
    assert 0 < len(addresses) == len(set(addresses)) <= 12


def test_a_forked_child_has_its_own_copy():
    tensor = _memory.empty(SHAPE, torch.float32).fill_(1)
    child = os.fork()
    if child == 0:  # one element only: torch's threads did not come along
        tensor[0, 0] = 2
        del tensor
        os._exit(0 if kept_bytes() == _memory.LARGE else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert tensor.eq(1).all() and kept_bytes() == 0
