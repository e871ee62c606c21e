"""What a training step costs where: the time inside chosen modules, the memory kept for backward and at the peak."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class ModuleShare:
    """Seconds of one step, and the seconds of it inside the chosen modules, forward and backward."""

    step_seconds: float
    module_seconds: float

    @property
    def share(self) -> float:
        """Part of the step inside the modules, 0 to 1."""
        return self.module_seconds / self.step_seconds


def module_share(model: torch.nn.Module, names: Iterable[str], step: Callable[[], object]) -> ModuleShare:
    """Times one training step and the part of it inside some of the model's modules.

    Hooks mark the time when each module's forward begins and ends, and when its output's gradient arrives and its
    input's leaves; autograd runs a module's own backward in one piece between those two. On CUDA the marks are
    events on the current stream, so a span includes the gaps between its kernels. The hooks are removed again.

    Args:
        model: holds the modules.
        names: as in ``model.named_modules()``; the modules must not contain one another, and take inputs that
            require a gradient.
        step: runs one forward and backward pass over the model, and whatever else belongs to a step.

    Raises:
        ValueError: a name is no module of the model.
    """
    modules = dict(model.named_modules())
    chosen = list(names)
    unknown = [name for name in chosen if name not in modules]
    if unknown:
        raise ValueError(f"module_share: names has {unknown[0]!r}, which is no module of {type(model).__name__}.")

    on_cuda = next(model.parameters()).is_cuda
    spans: list[tuple[Any, Any]] = []
    open_marks: dict[tuple[str, str], Any] = {}

    def mark() -> Any:
        if not on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if on_cuda else end - begin

    def begin(name: str, direction: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_marks[name, direction] = mark()

        return hook

    def end(name: str, direction: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            spans.append((open_marks.pop((name, direction)), mark()))

        return hook

    handles = []
    for name in chosen:
        handles += [
            modules[name].register_forward_pre_hook(begin(name, "forward")),
            modules[name].register_forward_hook(end(name, "forward")),
            modules[name].register_full_backward_pre_hook(begin(name, "backward")),
            modules[name].register_full_backward_hook(end(name, "backward")),
        ]
    try:
        whole = mark()
        step()
        whole_end = mark()
    finally:
        for handle in handles:
            handle.remove()
    if on_cuda:
        torch.cuda.synchronize()
    return ModuleShare(seconds(whole, whole_end), sum(seconds(*span) for span in spans))


def saved_for_backward(model: torch.nn.Module, step: Callable[[], object]) -> int:
    """Bytes of activations that one step keeps from its forward to its backward pass.

    Counts each storage once, and no parameter of the model. Unlike the peak of a process it knows no fragmentation
    and no pages held back by an allocator, so two runs of the same model give the same number.

    Args:
        model: its parameters are left out.
        step: runs one forward and backward pass.
    """
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values())


class PeakMemory:
    """Peak of the memory that a process takes after this object is made, in bytes.

    On CUDA it is what torch's allocator had handed out. On a CPU it is anonymous memory: the kernel's high-water
    mark of the resident set less the files mapped into it (the libraries' code), less what was there at the start.
    The mark is one per process, so a process measures one thing: its own life from here on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            self._start = _status_bytes("RssAnon")

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status_bytes("VmHWM") - _status_bytes("RssFile") - _status_bytes("RssShmem") - self._start


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"PeakMemory: /proc/self/status has no {field}.")
    return int(found.group(1)) * 1024
