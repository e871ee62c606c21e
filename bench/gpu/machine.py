"""What this machine and its interpreter have, found out before anything is built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = {"scikit_build_core": "scikit-build-core", "pybind11": "pybind11", "pip": "pip"}
WANTED = ("pytest", "hypothesis", "expecttest", "transformers", "matplotlib", "triton")
PEERS = ("liger_kernel", "quack", "apex", "transformer_engine", "flash_attn")

# In a process of its own: this one must not hold a CUDA context beside those that are measured.
_PROBE = """
import json, sys
from importlib.util import find_spec
found = {"modules": {name: find_spec(name) is not None for name in sys.argv[1:]}}
try:
    import torch
except ImportError as error:
    found["no_torch"] = str(error)
else:
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        found["devices"].append({"name": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory})
print(json.dumps(found))
"""


class Unusable(Exception):
    """Why `make gpu` cannot start here, in one sentence."""


@dataclass(frozen=True)
class Machine:
    """device: "cuda" or, to try the stages out where there is no GPU, "cpu"; the first GPU is the one that counts."""

    device: str
    name: str
    capability: str | None
    driver: str | None
    torch: str
    cuda: str | None
    missing: tuple[str, ...]
    peers: tuple[str, ...]

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def architecture(self) -> str:
        """As CUDAARCHS takes it: 9.0 is 90."""
        return (self.capability or "").replace(".", "")

    def to_dict(self) -> dict:
        return {
            "device": self.name,
            "capability": self.capability,
            "driver": self.driver,
            "torch": self.torch,
            "cuda": self.cuda,
            "python": sys.version.split()[0],
            "nvcc": nvcc_version(),
            "missing": list(self.missing),
            "peers": list(self.peers),
        }


def look(device: str) -> Machine:
    """The machine for a kind of device; Unusable if it has none, or if the interpreter lacks what a build needs."""
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, *BUILD, "cmake", "ninja", *WANTED, *PEERS], capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise Unusable(f"{sys.executable} cannot look for a GPU: {last}")
    found = json.loads(result.stdout.splitlines()[-1])
    smi = _nvidia_smi()
    if "no_torch" in found:
        raise Unusable(f"{sys.executable} cannot import torch ({found['no_torch']}); name another with PYTHON=.")
    if device == "cuda" and not found["devices"]:
        seen = f"nvidia-smi shows {smi[0]}" if smi else "nvidia-smi shows none"
        build = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA"
        raise Unusable(f"no GPU that can be used: {seen}, and torch {found['torch']} (with {build}) sees none.")
    modules = found["modules"]
    lacking = [package for module, package in BUILD.items() if not modules[module]]
    if not (modules["cmake"] or shutil.which("cmake")):
        lacking.append("cmake")
    if not (modules["ninja"] or any(map(shutil.which, ("ninja", "gmake", "make")))):
        lacking.append("ninja or make")
    if device == "cuda" and nvcc() is None:
        lacking.append("nvcc (in CUDACXX, CUDA_HOME, CUDA_PATH, on PATH or in /usr/local/cuda/bin)")
    if lacking:
        raise Unusable(f"{sys.executable} lacks {', '.join(lacking)}; nothing is downloaded here.")
    first = found["devices"][0] if device == "cuda" else {"name": "cpu", "capability": None}
    return Machine(
        device=device,
        name=first["name"],
        capability=first["capability"],
        driver=smi[1] if smi else None,
        torch=found["torch"],
        cuda=found["cuda"],
        missing=tuple(name for name in WANTED if not modules[name]),
        peers=tuple(name for name in PEERS if modules[name]),
    )


def _nvidia_smi() -> tuple[str, str] | None:
    """Name and driver of the first GPU."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^(.+), ([\d.]+)$", result.stdout, re.MULTILINE)
    return (found[1], found[2]) if result.returncode == 0 and found else None


def nvcc() -> str | None:
    """The compiler that cmake/nvcc.cmake finds."""
    import sysconfig

    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    usual = ["/usr/local/cuda/bin", f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin"]
    path = os.pathsep.join([*homes, os.environ.get("PATH", os.defpath), *usual])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


def nvcc_version() -> str | None:
    if nvcc() is None:
        return None
    try:
        text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or in the toolkit of nvcc, whose links may lead elsewhere than to the toolkit."""
    if found := shutil.which("compute-sanitizer"):
        return found
    compiler = nvcc()
    bins = [] if compiler is None else [Path(compiler).parent, Path(compiler).resolve().parent]
    places = [
        folder for each in [*bins, Path("/usr/local/cuda/bin")] for folder in (each, each / "../compute-sanitizer")
    ]
    return next(
        (str(folder / "compute-sanitizer") for folder in places if (folder / "compute-sanitizer").is_file()), None
    )


def tree() -> tuple[str, bool]:
    """The commit of the checkout, or where git cannot tell it a digest of the sources, and whether it was changed."""
    import hashlib

    def git(*arguments: str) -> str | None:
        # A checkout that another user owns is still this checkout.
        command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") == str(ROOT) and (head := git("rev-parse", "--short=12", "HEAD")):
        return head, bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results"))
    digest = hashlib.sha256()
    paths = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder in ("csrc", "cmake", "python", "tests", "bench"):
        paths += sorted(p for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts)
    for path in filter(Path.is_file, paths):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"sources-{digest.hexdigest()[:12]}", False
