"""What nvcc makes of a CUDA source, no GPU needed: the registers, memory and memory accesses of each kernel.

As a script, `python tests/ptxas.py sm_90`, it prints the table that docs/results/ptxas-sm90.md holds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Kernel(NamedTuple):
    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads
    shared_bytes: int  # static
    accesses: dict[str, int]  # "ld.global.v4.u32": how many of them stand in the code
    rounded_products: int  # how many multiplications ptxas may not fuse with an addition


def find_nvcc() -> str | None:
    """nvcc, where cmake/cuda.cmake looks for it: CUDACXX, PATH, the PyPI wheels."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(wheels) if wheels.exists() else None)


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def _demangled(names: list[str]) -> list[str]:
    """`cuda::norm_forward<float, float>` for each mangled name."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"bigmodel::|^void |\(anonymous namespace\)::|\([^()]*\)$", "", name) for name in plain]


def kernels(source: Path, arch: str, nvcc: str) -> list[Kernel]:
    """Compiles `source` for one architecture, in a temporary folder, and reads what ptxas and the PTX say."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", f"-arch={arch}", "-std=c++17", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        command += [str(source), "-o", f"{folder}/{source.stem}.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr)
        ptx = Path(folder, f"{source.stem}.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE))
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)$",
        result.stderr,
        re.DOTALL | re.MULTILINE,
    )
    names = _demangled([mangled for mangled, *_ in found])
    rows = []
    for name, (mangled, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        accesses: dict[str, int] = {}
        for access in re.findall(r"\b((?:ld|st)\.(?:global|local)\S*)", bodies[mangled]):
            accesses[access] = accesses.get(access, 0) + 1
        spills = int(stores) + int(loads)
        products = len(re.findall(r"\bmul\.rn\.f(?:32|64)", bodies[mangled]))
        shared_bytes = int(shared[1]) if shared else 0
        rows.append(Kernel(name, int(registers), int(stack), spills, shared_bytes, accesses, products))
    return sorted(rows)


def main(arch: str = "sm_90") -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("ptxas.py: nvcc is neither in CUDACXX, nor on PATH, nor installed from PyPI.")
    print(f"# Kernels for {arch}\n\nnvcc {nvcc_version(nvcc)}; made by `python tests/ptxas.py {arch}`.\n")
    print("| kernel | registers | bytes of stack | of spills | of static shared memory |\n|---|---:|---:|---:|---:|")
    for op in sorted((ROOT / "csrc" / "ops").glob("*.h")):
        for k in kernels(ROOT / "csrc" / "cuda" / f"{op.stem}.cu", arch, nvcc):
            print(f"| `{k.name}` | {k.registers} | {k.stack_bytes} | {k.spill_bytes} | {k.shared_bytes} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
