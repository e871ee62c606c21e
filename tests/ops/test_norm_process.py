"""The normalisation modules, and the ops among threads, processes and streams."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from norm_cases import arguments
from torch.testing import assert_close

import bigmodel
from bigmodel import _native


# --- modules ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_modules_are_torchs_own(device, kind):
    stock = getattr(torch.nn, kind)(24, eps=1e-3, device=device)
    ours = getattr(bigmodel.nn, kind)(24, eps=1e-3, device=device)
    assert isinstance(ours, getattr(torch.nn, kind))
    with torch.no_grad():
        stock.weight.uniform_(0.5, 1.5)
    ours.load_state_dict(stock.state_dict())
    assert ours.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(3, 24, device=device)
    assert_close(ours(x), stock(x))
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(x), ours(x)) and type(clone) is type(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), ours(x))
    assert repr(ours) == repr(stock)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_module_options(device, kind):
    module = getattr(bigmodel.nn, kind)(
        24, weight_offset=1.0, out_dtype=torch.bfloat16, memory_efficient=True, device=device
    )
    assert not module.weight.detach().any(), "weights stored around zero start at zero"
    x = torch.randn(3, 24, device=device)
    assert module(x).dtype is torch.bfloat16
    assert_close(module(x).float(), getattr(torch.nn, kind)(24, device=device)(x), atol=2e-2, rtol=8e-3)
    assert "weight_offset=1.0" in repr(module) and "memory_efficient=True" in repr(module)


# --- threads and processes --------------------------------------------------------------------------------------------
def test_one_openmp_runtime():
    bigmodel.rms_norm(torch.randn(512, 1024), 1024)
    assert len(_native.openmp_runtimes()) == 1


def test_a_second_thread(device):
    x, w, _ = arguments(device, rows=2048, cols=128, grad=False)
    expected = bigmodel.rms_norm(x, 128, w)
    results = []
    workers = [threading.Thread(target=lambda: results.append(bigmodel.rms_norm(x, 128, w))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


def test_the_gil_is_released():
    """While one thread normalises, another must get to run Python."""
    x = torch.randn(4096, 4096)
    done, ticks = threading.Event(), []

    def work():
        for _ in range(20):
            bigmodel.rms_norm(x, 4096)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        ticks.append(None)
    worker.join()
    assert len(ticks) > 100


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return bigmodel.rms_norm(torch.full((256, 1024), index + 1.0), 1024)


def test_a_forked_dataloader_worker():
    bigmodel.rms_norm(torch.randn(512, 1024), 1024)  # starts the parent's thread pool, which a fork does not copy
    loader = torch.utils.data.DataLoader(_Rows(), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert sum(float(batch.mean()) for batch in loader) == pytest.approx(4, abs=1e-3)


@pytest.mark.cuda
def test_cuda_graph_capture():
    x, w, _ = arguments("cuda", grad=False)
    out = bigmodel.rms_norm(x, 24, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bigmodel.rms_norm(x, 24, w)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(out, bigmodel.rms_norm(x, 24, w))


@pytest.mark.cuda
def test_the_current_stream_is_used():
    x, w, _ = arguments("cuda", rows=4096, cols=4096, grad=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = bigmodel.rms_norm(x * 2, 4096, w)
    stream.synchronize()
    assert_close(out, F.rms_norm(x * 2, (4096,), w, torch.finfo(torch.float32).eps))
