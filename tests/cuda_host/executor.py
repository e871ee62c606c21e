"""Runs the CUDA sources on the CPU, under checks: see README.md beside this file."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ptxas
import torch

from . import build, contracts
from .contracts import Matrix


class Traffic(NamedTuple):
    """What one instruction of a kernel cost over all its warps: sectors of 32 bytes, or wavefronts in shared memory."""

    kernel: str
    where: str  # file:line, and where that was inlined
    space: str  # "global" or "shared"
    kind: str  # "read" or "write"
    bytes: int  # of one lane
    accesses: int  # by a warp
    cost: int
    least: int  # the fewest sectors or wavefronts that carry the same bytes


def _import(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def _executor() -> ModuleType:
    return _import("_executor", build.executor())


@functools.cache
def _symbol(path: str, offset: str) -> tuple[str, str]:
    """The function at an offset in a library, and its place in the sources, innermost first."""
    if path.endswith(".ptx"):
        return "", _place_in_ptx(path, int(offset, 16))
    command = ["addr2line", "--exe", path, "--functions", "--inlines", "--demangle", offset]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    functions, places = lines[0::2], lines[1::2]
    headers = str(build.HERE / "include")
    shown = [Path(place.split(" ")[0]).name for place in places if not place.startswith(headers)]
    function = re.sub(r"\(anonymous namespace\)::|\bbigmodel::|^void ", "", functions[-1])
    return re.sub(r"\((?!anonymous).*", "", function), " in ".join(dict.fromkeys(shown[:3]))


@functools.cache
def _text(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _place_in_ptx(path: str, line: int) -> str:
    """The line of the text, after the project's lines that the compiler says it comes from, innermost first."""
    numbered = map(re.compile(r'\s*\.file\s+(\d+) "([^"]*)"').match, _text(path))
    files = {match[1]: match[2] for match in numbered if match}
    loc = re.compile(r"\s*\.loc\s+(\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?")
    found = next(filter(None, map(loc.match, reversed(_text(path)[: line - 1]))), None)
    pairs = (found.groups()[:2], found.groups()[2:]) if found else ()
    places = [(files[file], number) for file, number in pairs if file]
    own = [f"{Path(file).name}:{number}" for file, number in places if file.startswith(str(build.ROOT))]
    return " in ".join([*own, f"{Path(path).name}:{line}"])


_CODE = re.compile(r"\{code:([^}]*):(0x[0-9a-f]+)\}")


def _named(text: str) -> str:
    text = re.sub("kernel " + _CODE.pattern, lambda match: "kernel " + _symbol(match[1], match[2])[0], text)
    return _CODE.sub(lambda match: _symbol(match[1], match[2])[1], text)


_one_call = threading.Lock()  # the executor knows the buffers of one call at a time


class Executor:
    """The functions of a module of kernels, each call checked against its contract.

    Attributes:
        Violation: the exception of a check that failed; a RuntimeError.
        devices: what is pretended under each ordinal.
    """

    def __init__(self, module: ModuleType, contracts: dict[str, Any]):
        self.path = Path(module.__file__)
        self._module = module
        self._contracts = contracts
        self.Violation = _executor().Violation
        self.devices = _executor().devices()

    def __getattr__(self, name: str):
        function = getattr(self._module, name)
        contract = self._contracts.get(name)
        return function if contract is None else functools.partial(self._checked, function, contract)

    def _checked(self, function, contract, *args):
        return self.call(function, contract(*args), *args)

    def call(self, function, buffers: Iterable[Matrix], *args):
        """function(*args), which may touch these buffers and must write its outputs."""
        roles = _executor().Role
        present = [matrix for matrix in buffers if matrix.address and matrix.cols]
        with _one_call:
            try:
                for matrix in present:
                    _executor().add_buffer(
                        matrix.name, getattr(roles, matrix.role), matrix.address, matrix.rows,
                        matrix.row_bytes(), matrix.stride_bytes(), matrix.element_bytes(),
                    )  # fmt: skip
                _executor().begin_call()
                result = function(*args)
                _executor().end_call()
                _executor().check_written()
                return result
            except self.Violation as violation:
                raise self.Violation(_named(str(violation))) from None
            finally:
                _executor().clear_buffers()

    @property
    def context(self) -> int:
        """The device whose context the calling thread has; -1 for none, as in a thread that has used no device yet."""
        return _executor().current_context()

    @context.setter
    def context(self, device: int) -> None:
        _executor().set_current_context(device)

    def take_traffic(self) -> list[Traffic]:
        """What every memory instruction has cost since the last call of this."""
        return [
            Traffic(_named("kernel " + kernel)[7:], _named(code), "shared" if shared else "global",
                    "write" if write else "read", *counts)
            for kernel, code, shared, write, *counts in _executor().take_traffic()
        ]  # fmt: skip


def open_module(name: str, kernels: list[Path], binding: Path) -> ModuleType:
    """Builds a module of CUDA sources where that is needed, and imports it."""
    executor = _executor()
    built = build.module(name, kernels, binding)
    executor.declare(str(built.path), built.shared, built.bounds)
    return _import(name, built.path)


@functools.cache
def load() -> Executor:
    """The executor of csrc/cuda/*.cu: the names of `_C.cuda`, on CPU memory."""
    kernels = sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))
    module = open_module("_cuda_host", kernels, build.HERE / "module.cpp")
    return Executor(module, contracts.of(module))


@functools.cache
def _load_ptx(executor: Executor, sources: tuple[Path, ...], arch: int) -> None:
    for file in build.ptx(sources, arch):
        declare_ptx(executor, arch, file, build.entries(executor.path, file))


def declare_ptx(executor: Executor, arch: int, file: Path, entries: dict[int, str]) -> None:
    """Reads PTX for devices of an architecture: its entries, by the offset of the kernel that each stands for."""
    _executor().declare_ptx(arch, str(file), str(executor.path), entries)


@contextlib.contextmanager
def executing_ptx(executor: Executor, sources: Iterable[Path], devices: Iterable[int] = (0,)) -> Iterator[None]:
    """Within this, launches on these devices execute what nvcc makes of the kernels, not what g++ makes of them."""
    for device in devices:
        _load_ptx(executor, tuple(sources), int(re.match(r"sm_(\d+)", executor.devices[device])[1]))
    before = _executor().execute_ptx(True)
    try:
        yield
    finally:
        _executor().execute_ptx(before)


@contextlib.contextmanager
def as_cpu(device: int = 0, ptx: bool = False) -> Iterator[Executor]:
    """Within this, bigmodel's ops on CPU tensors run the CUDA kernels, as on the device of that ordinal.

    ptx: execute what nvcc makes of the kernels, not what g++ makes of them.
    """
    from bigmodel import _registry

    executor = load()
    native, place = _registry.native, _registry.place

    def host_native(tensor: torch.Tensor) -> Any:
        return executor if tensor.is_cpu else native(tensor)

    def host_place(tensor: torch.Tensor) -> tuple[int, int]:
        return (device, 0) if tensor.is_cpu else place(tensor)

    _registry.native, _registry.place = host_native, host_place
    try:
        with executing_ptx(executor, ptxas.SOURCES, (device,)) if ptx else contextlib.nullcontext():
            yield executor
    finally:
        _registry.native, _registry.place = native, place


def table(rows: Iterable[Traffic]) -> str:
    """Traffic as text: a line for each kernel, then one for each of its instructions that costs more than it must."""
    rows = list(rows)
    lines = [f"{'accesses':>10} {'sectors':>10} {'excess':>8} {'wavefronts':>10} {'conflicts':>9}  kernel"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        spaces = {space: [row for row in own if row.space == space] for space in ("global", "shared")}
        cost = {space: sum(row.cost for row in part) for space, part in spaces.items()}
        excess = {space: cost[space] - sum(row.least for row in part) for space, part in spaces.items()}
        lines.append(
            f"{sum(row.accesses for row in own):>10} {cost['global']:>10} {excess['global']:>8} "
            f"{cost['shared']:>10} {excess['shared']:>9}  {kernel}"
        )
        for row in own:
            if row.cost > row.least:
                what = f"{row.space} {row.kind}, {row.bytes} bytes a lane, {row.where}"
                lines.append(f"{row.accesses:>10} {row.cost:>10} for {row.least}: {what}")
    return "\n".join(lines)
