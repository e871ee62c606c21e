"""What nvcc makes of the CUDA sources, no GPU needed: registers, memory, machine code and occupancy of each kernel.

`python tests/ptxas.py` writes the tables docs/results/ptxas-sm*.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "cuda" / f"{op.stem}.cu" for op in sorted((ROOT / "csrc" / "ops").glob("*.h"))]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# Of a multiprocessor (CUDA C++ Programming Guide, "Technical specifications per compute capability"): 64 warps, 32
# blocks and 65536 registers, a quarter for each of four schedulers, given to warps by 256; shared memory, of which each
# block takes 1 KiB besides its own.
WARPS, BLOCKS, REGISTERS = 64, 32, 65536
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}


class Kernel(NamedTuple):
    name: str  # update<AdamOp, float>
    arch: str
    threads: int  # the largest block that it is compiled for
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads
    shared_bytes: int  # static
    rounded_products: int  # how many multiplications ptxas may not fuse with an addition
    code: sass.Code

    @property
    def blocks(self) -> int:
        """How many of its largest blocks a multiprocessor holds."""
        warps = (self.threads + 31) // 32
        warp_registers = (self.registers * 32 + 255) // 256 * 256
        by_registers = REGISTERS // 4 // warp_registers * 4 // warps
        return min(BLOCKS, WARPS // warps, by_registers, SHARED_KIB[self.arch] * 1024 // (self.shared_bytes + 1024))

    @property
    def occupancy(self) -> float:
        return self.blocks * ((self.threads + 31) // 32) / WARPS


def find_nvcc() -> str | None:
    """nvcc, where cmake/cuda.cmake looks for it: CUDACXX, PATH, the PyPI wheels."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(wheels) if wheels.exists() else None)


class Tools(NamedTuple):
    nvcc: str
    nvdisasm: str


def find_tools() -> Tools | str:
    """nvcc and nvdisasm, or a sentence that says which is missing."""
    nvcc, nvdisasm = find_nvcc(), sass.find_nvdisasm()
    if nvcc is None:
        return "nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI"
    if nvdisasm is None:
        return "nvdisasm is neither on PATH nor installed from PyPI (nvidia-cuda-nvdisasm)"
    return Tools(nvcc, nvdisasm)


def _version(program: str) -> str:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def _demangled(names: list[str]) -> list[str]:
    """`norm_forward<float, float>` for each mangled name."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    plain = [re.sub(r"bigmodel::|cuda::|^void |\(anonymous namespace\)::", "", name) for name in plain]
    return [name[: name.index("(")] for name in plain]


def compile_source(source: Path, arch: str, tools: Tools) -> list[Kernel]:
    """Compiles one source for one architecture, in a temporary folder, and reads ptxas, PTX and machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, f"{source.stem}.cubin")
        command = [tools.nvcc, "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas=-v", "--keep"]
        command += [f"--keep-dir={folder}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr)
        ptx = cubin.with_suffix(".ptx").read_text()
        functions = sass.disassemble(cubin, tools.nvdisasm)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE))
    threads = {name: int(n) for name, n in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx)}
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$",
        result.stderr,
        re.DOTALL | re.MULTILINE,
    )
    kernels = []
    for name, (mangled, stack, stores, loads, registers, rest) in zip(
        _demangled([mangled for mangled, *_ in found]), found, strict=True
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        products = len(re.findall(r"\bmul\.rn\.f(?:32|64)", bodies[mangled]))
        kernels.append(
            Kernel(
                name, arch, threads[mangled], int(registers), int(stack), int(stores) + int(loads),
                int(shared[1]) if shared else 0, products, functions[mangled],
            )
        )  # fmt: skip
    return kernels


def compile_all(arch: str, tools: Tools) -> dict[str, Kernel]:
    """Every kernel of every row for one architecture, by name; as many compilers at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda source: compile_source(source, arch, tools), SOURCES)
    return {kernel.name: kernel for kernels in found for kernel in sorted(kernels)}


def _table(arch: str, tools: Tools) -> str:
    lines = [
        f"# Kernels for {arch}",
        "",
        f"nvcc {_version(tools.nvcc)}, nvdisasm {_version(tools.nvdisasm)}; made by `python tests/ptxas.py`.",
        "",
        "Threads: the largest block that the kernel is compiled for. Blocks and occupancy: how many such blocks a",
        "multiprocessor holds, and the share of its 64 warps, by registers, static shared memory and block size.",
        "Dynamic shared memory follows the shape of a call: norm_backward runs one block on each multiprocessor by",
        "design, and norm_forward_any and norm_backward_any ask for half of the shared memory at most. Loop: the",
        "128-bit and the narrower accesses to global memory that stand in the loops that read it, or in the whole",
        "kernel where a block takes one row; narrower ones serve what the 16-byte way cannot take",
        "(tests/test_ptxas.py).",
        "",
        "| kernel | threads | registers | stack | spills | shared | blocks | occupancy | wide in loop | narrower |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for k in compile_all(arch, tools).values():
        code = k.code.over_rows()
        accesses = code.accesses(set().union(*code.row_loops()))
        every = sass.moved(accesses, sass.READS + sass.WRITES)
        wide = sass.moved(accesses, sass.READS + sass.WRITES, 128)
        lines.append(
            f"| `{k.name}` | {k.threads} | {k.registers} | {k.stack_bytes} | {k.spill_bytes} | {k.shared_bytes} "
            f"| {k.blocks} | {k.occupancy:.0%} | {wide} | {every - wide} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    tools = find_tools()
    if isinstance(tools, str):
        sys.exit(f"ptxas.py: {tools}.")
    for arch in ARCHITECTURES:
        (ROOT / "docs" / "results" / f"ptxas-{arch.replace('_', '')}.md").write_text(_table(arch, tools))


if __name__ == "__main__":
    main()
