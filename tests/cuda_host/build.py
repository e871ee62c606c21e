"""Builds the executor, and modules of CUDA sources that run on it, with the C++ compiler alone.

Everything lands in build/cuda_host/ under a hash of what it is made from, so that an unchanged tree builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
from ptxas import find_nvcc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_host"

DYNAMIC_SHARED_BYTES = 228 * 1024  # more than any device gives to one block
_COMPILER = "g++"
_COMMON = ["-std=c++17", "-fPIC", "-g1", f"-I{HERE / 'include'}"]
_PYTHON = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden"]
# Optimisations that split, merge or invent memory accesses are off: what is checked is what the source says.
_KERNEL = [
    "-x", "c++", "-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra", "-fno-ipa-sra", "-fno-tree-vectorize", "-fno-store-merging", "-fno-tree-loop-distribute-patterns",
    "-fno-extern-tls-init", "-fno-ipa-reference", "-Wno-unknown-pragmas", "-Wno-attributes",
    '-DBIGMODEL_CUDA_ARCHITECTURES="the host executor"',
]  # fmt: skip
_LINK = ["-shared", "-Wl,-rpath,$ORIGIN", "-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset"]


def _run(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"cuda_host: `{command[0]}` is not on PATH; g++ 12 or newer and binutils are needed.")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"cuda_host: `{' '.join(command)}` failed:\n{result.stderr}")
    return result.stdout


def _hash(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
    return digest.hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


def _headers(kernels: Sequence[Path]) -> list[Path]:
    """Those of the project, and those beside the kernels."""
    folders = {ROOT / "csrc", *(kernel.parent for kernel in kernels)}
    return sorted({path for folder in folders for path in _sources(folder) if path.suffix in {".h", ".cuh"}})


def _compile(jobs: list[tuple[Path, Path, list[str]]]) -> None:
    """Each job is (source, object, flags); objects that exist are kept."""

    def run(job: tuple[Path, Path, list[str]]) -> None:
        source, target, flags = job
        if not target.exists():
            unfinished = target.with_suffix(".part")
            _run([_COMPILER, *_COMMON, *flags, "-c", str(source), "-o", str(unfinished)])
            unfinished.rename(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))


def _thread_locals(file: Path) -> list[tuple[str, int, int, bool]]:
    """(mangled name, offset, bytes, defined) of the thread-local symbols."""
    pattern = re.compile(r"\s*\d+: (\w+)\s+(\w+) TLS\s+\w+\s+\w+\s+(\w+) (\S+)")
    rows = (pattern.match(line) for line in _run(["readelf", "--syms", "--wide", str(file)]).splitlines())
    return [(r[4], int(r[1], 16), int(r[2], 0), r[3] != "UND") for r in rows if r]


def _dynamic_shared(names: Sequence[str], folder: Path) -> Path:
    """An assembly file in which every `extern __shared__` array begins at one and the same place."""
    labels = "".join(f".globl {name}\n.hidden {name}\n.type {name}, @object\n{name}:\n" for name in names)
    sizes = "".join(f".size {name}, {DYNAMIC_SHARED_BYTES}\n" for name in names)
    path = folder / "dynamic_shared.s"
    path.write_text(
        f'.section .tbss,"awT",@nobits\n.balign 1024\n{labels}.zero {DYNAMIC_SHARED_BYTES}\n{sizes}'
        '.section .note.GNU-stack,"",@progbits\n'
    )
    return path


def executor() -> Path:
    """The library `_executor`, which is also a Python module."""
    sources = _sources(HERE / "runtime")
    folder = BUILD / _hash(_COMPILER, _COMMON, _PYTHON, *sources, *_sources(HERE / "include"))
    target = folder / "_executor.so"
    with _Lock():
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [(s, folder / f"{s.stem}.o", ["-O2", "-Wall", "-Wextra"]) for s in sources if s.suffix == ".cpp"]
            jobs = [(s, o, f + (_PYTHON if s.stem == "bindings" else [])) for s, o, f in jobs]
            _compile(jobs)
            unfinished = target.with_suffix(".part")
            objects = [str(o) for _, o, _ in jobs]
            _run([_COMPILER, "-shared", "-Wl,-soname,_executor.so", *objects, "-o", str(unfinished)])
            unfinished.rename(target)
    return target


class Module(NamedTuple):
    path: Path
    shared: list[tuple[str, int, int, bool]]  # name, offset in the module's thread-local block, bytes, dynamic
    bounds: dict[int, int]  # by the kernel's offset in the library: the threads of its __launch_bounds__


def module(name: str, kernels: Sequence[Path], binding: Path) -> Module:
    """The Python module `name` of instrumented CUDA sources and a binding, and what the executor must know of it."""
    library = executor()
    folder = library.parent
    headers = _headers(kernels)
    version = _hash(_KERNEL, _LINK, *headers, *_sources(HERE / "include"))
    objects = [folder / f"{source.stem}-{_hash(version, source)}.o" for source in (*kernels, binding)]
    target = folder / f"{name}-{_hash(*(path.name for path in objects))}" / f"{name}.so"
    with _Lock():
        if not target.exists():
            include = [f"-I{ROOT / 'csrc'}"]
            jobs = [(s, o, [*_KERNEL, *include]) for s, o in zip(kernels, objects, strict=False)]
            _compile([*jobs, (binding, objects[-1], ["-O1", *_PYTHON, *include])])
            target.parent.mkdir(exist_ok=True)
            symbols = {symbol[0]: symbol[3] for o in objects[:-1] for symbol in _thread_locals(o)}
            undefined = sorted(symbol for symbol, defined in symbols.items() if not defined)
            extra = [str(_dynamic_shared(undefined, target.parent))] if undefined else []
            unfinished = target.with_suffix(".part")
            link = [*_LINK, f"-Wl,-rpath,{folder}", *(str(o) for o in objects), *extra, str(library)]
            _run([_COMPILER, *link, "-o", str(unfinished)])
            unfinished.rename(target)
    return Module(target, _shared_variables(target, objects[:-1]), _bounds(target, [*kernels, *headers]))


def _shared_variables(target: Path, objects: Sequence[Path]) -> list[tuple[str, int, int, bool]]:
    symbols = {symbol[0]: symbol[3] for o in objects for symbol in _thread_locals(o)}
    found = [symbol for symbol in _thread_locals(target) if symbol[0] in symbols]
    plain = _run(["c++filt", *(symbol[0] for symbol in found)]).splitlines() if found else []
    return [
        (text.rsplit("::", 1)[-1], offset, size, not symbols[mangled])
        for text, (mangled, offset, size, _) in zip(plain, found, strict=True)
    ]


def ptx(sources: Sequence[Path], arch: int) -> list[Path]:
    """What nvcc makes of the sources for a virtual architecture, optimised as in a wheel."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("cuda_host: nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI.")
    command = [nvcc, "--ptx", "-O3", "-std=c++17", "-lineinfo", f"-arch=compute_{arch}"]
    # PTX names its sources by their paths, so it is not taken along to another place.
    version = _hash(command, str(ROOT), _run([nvcc, "--version"]), *_headers(sources))

    def make(source: Path) -> Path:
        target = BUILD / f"ptx-{_hash(version, source)}" / f"{source.stem}.sm_{arch}.ptx"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".part")
            _run([*command, str(source), "-o", str(unfinished)])
            unfinished.rename(target)
        return target

    with _Lock(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(make, sources))


def entries(library: Path, ptx: Path) -> dict[int, str]:
    """The kernels of PTX, by their offset in the library of the same source: the two compilers name them alike, but for
    what is in an unnamed namespace."""
    names = re.findall(r"\.entry (\w+)\(", ptx.read_text())
    offsets: dict[str, set[int]] = {}
    for offset, name in functions(library):
        offsets.setdefault(name, set()).add(offset)
    plain = _run(["c++filt", *names]).splitlines()
    ambiguous = [name for name in plain if len(offsets[name]) > 1]
    if ambiguous:
        raise RuntimeError(f"cuda_host: two kernels are named {ambiguous[0]}; which is the PTX's cannot be told.")
    return {min(offsets[name]): mangled for name, mangled in zip(plain, names, strict=True)}


def functions(library: Path) -> list[tuple[int, str]]:
    """(offset, name) of every function in the library."""
    pattern = re.compile(r"\s*\d+: (\w+)\s+\w+ FUNC\s+\w+\s+\w+\s+\w+ (\S+)")
    lines = _run(["readelf", "--syms", "--wide", str(library)]).splitlines()
    symbols = [match.groups() for match in map(pattern.match, lines) if match]
    names = _run(["c++filt", *(name for _, name in symbols)]).splitlines()
    return [(int(offset, 16), name) for (offset, _), name in zip(symbols, names, strict=True)]


def _bounds(target: Path, sources: Sequence[Path]) -> dict[int, int]:
    """From the sources: a compiler for CPUs has no attribute to carry the number to the launch."""
    text = "\n".join(source.read_text() for source in sources)
    constants = dict(re.findall(r"constexpr int (k\w+) = ([^;]+);", text))

    def value(expression: str) -> int:
        return eval("(" + re.sub(r"k\w+", lambda name: str(value(constants[name[0]])), expression) + ")")

    found = re.findall(r"__launch_bounds__\(\s*([^(),]+)(?:,[^()]*)?\)\s*(\w+)\(", text)
    if len(found) != len(re.findall(r"__launch_bounds__\(", text)):
        raise RuntimeError("cuda_host: a __launch_bounds__ is written in a way that build.py does not read.")
    threads = {name: value(expression) for expression, name in found}
    bases = [(offset, re.match(r"(?:void )?(?:[\w ()]+::)*(\w+)", name)) for offset, name in functions(target)]
    return {offset: threads[base[1]] for offset, base in bases if base and base[1] in threads}


class _Lock:
    """One build at a time, whichever process."""

    def __enter__(self):
        BUILD.mkdir(parents=True, exist_ok=True)
        self.file = open(BUILD / "lock", "w")  # noqa: SIM115
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()
