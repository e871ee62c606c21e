"""What this install can do and where it runs: the facts behind `bigmodel info` and every benchmark's record."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from bigmodel import __version__, _native

MINIMUM_DRIVER = 580  # the first driver series that runs CUDA 13, whatever its minor version

_DRIVER = re.compile(r"NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\s")


def collect() -> dict:
    """Gathers the facts as a dict that `json.dumps` takes.

    Keys: version, python, torch, native (compiler, instruction sets built, usable and chosen), cuda (built, status,
    architectures, runtime, driver, devices), cpu (model, cores, threads), openmp (paths of the runtimes in this
    process, from site-packages on if they lie there) and transparent_hugepage (the kernel's setting, None where it
    has none).

    Raises:
        ImportError: the native module is missing or does not load.
    """
    import torch

    native = _native.load()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": {
            "compiler": native.compiler,
            "isas_built": list(native.cpu.isas_built()),
            "isas_usable": list(native.cpu.isas_usable()),
            "isa_chosen": native.cpu.isa_chosen(),
        },
        "cuda": _cuda(native),
        "cpu": {"model": cpu_model(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
        "openmp": [path.split("/site-packages/")[-1] for path in _native.openmp_runtimes()],
        "transparent_hugepage": transparent_hugepage(),
    }


def _cuda(native) -> dict:
    import torch

    built = hasattr(native, "cuda")
    facts: dict = {
        "built": built,
        "status": native.cuda_status,
        "architectures": native.cuda_architectures.split(),
        "driver": driver_version() or _driver_by_nvidia_smi(),
        "driver_needed": MINIMUM_DRIVER,
        "devices": [],
    }
    if built:
        facts["runtime"] = cuda_version(native.cuda.runtime_version())
        facts["driver_supports"] = cuda_version(native.cuda.driver_version())
        facts["devices_seen_by_bigmodel"] = native.cuda.device_count()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        facts["devices"] = [
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
            for p in properties
        ]
    return facts


def cuda_version(code: int) -> str | None:
    """Turns CUDA's own encoding (13000) into "13.0"; 0 means that there is none."""
    return f"{code // 1000}.{code % 1000 // 10}" if code else None


def driver_version(path: str = "/proc/driver/nvidia/version") -> str | None:
    """The NVIDIA driver's version as the kernel module tells it, e.g. "580.65.06"; None without a driver."""
    try:
        found = _DRIVER.search(Path(path).read_text() + "\n")
    except OSError:
        return None
    return found.group(1) if found else None


def _driver_by_nvidia_smi() -> str | None:
    """For containers that show no /proc/driver; None where the tool is missing or says anything else."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d{3,}\.\d+(?:\.\d+)?$", told.strip().split("\n")[0])
    return found.group(0) if found else None


def driver_verdict(driver: str | None, supports: str | None = None) -> str:
    """One phrase: which driver is there, which is needed; `supports` is the CUDA version that the driver tells."""
    if driver is None and supports is not None:
        enough = int(supports.split(".")[0]) >= 13
        return f"of unknown version, needed >= {MINIMUM_DRIVER}" + ("" if enough else f": too old, for CUDA {supports}")
    if driver is None:
        return f"none, needed >= {MINIMUM_DRIVER}"
    enough = int(driver.split(".")[0]) >= MINIMUM_DRIVER
    return f"{driver}, needed >= {MINIMUM_DRIVER}" + ("" if enough else ": too old")


def cpu_model(path: str = "/proc/cpuinfo") -> str:
    """The processor's name; on machines whose kernel tells none (aarch64), the architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def transparent_hugepage(path: str = "/sys/kernel/mm/transparent_hugepage/enabled") -> str | None:
    """The kernel's transparent-hugepage setting: "always", "madvise" or "never"; None where it has none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", text)
    return found.group(1) if found else None


def render(facts: dict) -> str:
    """Lays the facts out for a terminal, one per line."""
    native, cuda, cpu = facts["native"], facts["cuda"], facts["cpu"]
    lines = [
        ("bigmodel", f"{facts['version']} (compiler {native['compiler']})"),
        ("torch", facts["torch"]),
        ("python", facts["python"]),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads"),
        (
            "instruction sets",
            f"built {' '.join(native['isas_built'])}; usable {' '.join(native['isas_usable'])}; "
            f"chosen {native['isa_chosen']}",
        ),
        ("OpenMP", ", ".join(facts["openmp"]) or "none"),
        ("huge pages", facts["transparent_hugepage"] or "not offered by this kernel"),
        ("CUDA", cuda["status"]),
    ]
    if cuda["built"]:
        lines += [
            ("architectures", " ".join(cuda["architectures"])),
            ("CUDA runtime", f"{cuda['runtime']}; the driver supports {cuda['driver_supports'] or 'none'}"),
            ("driver", driver_verdict(cuda["driver"], cuda["driver_supports"])),
        ]
    devices = [f"{d['name']} (sm_{d['capability'].replace('.', '')}, {d['memory_gib']} GiB)" for d in cuda["devices"]]
    lines.append(("devices", ", ".join(devices) or "no CUDA device seen by torch"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
