"""Machine code as nvdisasm shows it: how a kernel's blocks follow each other, and what its loops move."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# LDGSTS copies from global to shared memory; LD and ST are generic: shared memory of another block, or whichever of two
# addresses a kernel has chosen.
ACCESS = re.compile(r"(@!?\w+ )?(LDGSTS|LDG|LDL|LD|STG|STL|ST)\.([\w.]+)")
READS, WRITES = ("LDG", "LDGSTS"), ("STG",)


class Access(NamedTuple):
    kind: str  # LDG, STG, LDGSTS, LDL, STL, LD, ST
    bits: int
    predicated: bool


class Code(NamedTuple):
    """One function: instructions of each basic block, and the blocks that may follow it."""

    blocks: dict[str, list[str]]
    following: dict[str, set[str]]

    def accesses(self, blocks: Iterable[str] | None = None) -> Counter[Access]:
        chosen = self.blocks if blocks is None else blocks
        found = (ACCESS.search(line) for block in chosen for line in self.blocks[block])
        return Counter(Access(m[2], _bits(m[3]), m[1] is not None) for m in found if m)

    def loops(self) -> list[set[str]]:
        """The outermost loops: sets of blocks each of which can be reached from each other."""
        return _cycles(set(self.blocks), self.following)

    def over_rows(self) -> Code:
        """Itself if a loop reads global memory. A kernel that takes one row per block has no such loop: then all of its
        code becomes one, by a way back from every end to the beginning."""
        if self.row_loops():
            return self
        first = next(iter(self.blocks))
        return Code(self.blocks, {block: self.following.get(block) or {first} for block in self.blocks})

    def row_loops(self) -> list[set[str]]:
        """The loops that read global memory."""
        return [loop for loop in self.loops() if moved(self.accesses(loop), READS)]

    def wide_ways(self, loop: set[str]) -> list[set[str]]:
        """The ways round a loop on which every access to global memory that is not predicated has 128 bits."""
        wide = {
            block
            for block in loop
            if all(a.bits == 128 or a.predicated or a.kind not in READS + WRITES for a in self.accesses([block]))
        }
        return _cycles(wide, self.following)


def moved(accesses: Counter[Access], kinds: tuple[str, ...], bits: int | None = None) -> int:
    """How many accesses of these kinds, of `bits` or of any width, stand in the code."""
    return sum(n for a, n in accesses.items() if a.kind in kinds and bits in (None, a.bits))


def _bits(suffixes: str) -> int:
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((widths[s] for s in suffixes.split(".") if s in widths), 32)


def _cycles(nodes: set[str], following: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components with at least one edge (Tarjan's algorithm, without recursion)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_nodes: list[str] = []
    found = []
    for root in sorted(nodes):
        if root in order:
            continue
        walk = [(root, iter(sorted(following.get(root, set()) & nodes)))]
        order[root] = lowest[root] = len(order)
        open_nodes.append(root)
        while walk:
            node, rest = walk[-1]
            child = next(rest, None)
            if child is not None:
                if child not in order:
                    order[child] = lowest[child] = len(order)
                    open_nodes.append(child)
                    walk.append((child, iter(sorted(following.get(child, set()) & nodes))))
                elif child in open_nodes:
                    lowest[node] = min(lowest[node], order[child])
                continue
            walk.pop()
            if walk:
                lowest[walk[-1][0]] = min(lowest[walk[-1][0]], lowest[node])
            if lowest[node] == order[node]:
                at = open_nodes.index(node)
                component = set(open_nodes[at:])
                del open_nodes[at:]
                if len(component) > 1 or node in following.get(node, set()):
                    found.append(component)
    return found


def find_nvdisasm() -> str | None:
    """nvdisasm, on PATH or from PyPI's nvidia-cuda-nvdisasm."""
    wheel = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvdisasm")
    return shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)


def disassemble(cubin: Path, nvdisasm: str) -> dict[str, Code]:
    """The functions of a cubin by their mangled names. nvdisasm finds the basic blocks, indirect branches included."""
    command = [nvdisasm, "--output-control-flow-graph-with-basic-blocks", "--print-instr-offsets-cfg", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in re.split(r'^subgraph "cluster_', text, flags=re.MULTILINE)[1:]:
        blocks = {
            name: re.findall(r"[0-9a-f]{4}:\s+(.*?) ;", label.replace("\\", ""))
            for name, label in re.findall(r'^"([^"]+)"\n\[label="(.*)"\]$', part, re.MULTILINE)
        }
        following: dict[str, set[str]] = {}
        for before, after in re.findall(r'^"([^"]+)":\S+ -> "([^"]+)":', part, re.MULTILINE):
            following.setdefault(before, set()).add(after)
        functions[part[: part.index('"')]] = Code(blocks, following)
    return functions
