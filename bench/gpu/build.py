"""The build stage, as a process: installs the package into a folder of its own, imports it, runs one op on the device.

The folder comes first on PYTHONPATH in every later stage, so the interpreter's own packages are left as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bigmodel.benchmarks.journal import Journal
from gpu.machine import ROOT, nvcc

FACTS = "import json; from bigmodel import info; print(json.dumps(info.collect()))"
LAUNCH = """
import sys, torch, bigmodel
x, w = torch.randn(64, 4096, device=sys.argv[1]), torch.randn(4096, device=sys.argv[1])
ours, stock = bigmodel.rms_norm(x, 4096, w, 1e-5), torch.nn.functional.rms_norm(x, (4096,), w, 1e-5)
print((ours - stock).abs().max().item() / stock.abs().max().item())
"""
CLOSE = 1e-5


def install(device: str, architecture: str, site: Path) -> dict:
    """pip's own build, offline; returns its seconds. RuntimeError with the compiler's words if it fails."""
    shutil.rmtree(site, ignore_errors=True)
    env = {"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))), **os.environ}  # make's own is 1
    if device == "cuda":
        env |= {"CUDAARCHS": f"{architecture}-real", "CUDACXX": str(nvcc())}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), "--config-settings=build-dir=build/gpu/{wheel_tag}"]
    command += [f"--config-settings=cmake.define.BIGMODEL_CUDA={'ON' if device == 'cuda' else 'OFF'}", "."]
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        telling = [line.strip() for line in result.stdout.splitlines() if "error" in line.lower()]
        raise RuntimeError("pip could not build it: " + " | ".join(telling[:5] or result.stdout.splitlines()[-5:]))
    return {"seconds": round(time.monotonic() - start, 1)}


def ask(code: str, *arguments: str, site: Path) -> str:
    """What a process with the package on its path prints last; RuntimeError with its last words if it fails."""
    env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    result = subprocess.run([sys.executable, "-c", code, *arguments], env=env, cwd=site, capture_output=True, text=True)
    print(result.stdout, result.stderr, flush=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1])
    return result.stdout.strip().splitlines()[-1]


def facts(device: str, site: Path) -> dict:
    found = json.loads(ask(FACTS, site=site))
    if device == "cuda" and not found["cuda"]["built"]:
        raise RuntimeError(f"the CUDA kernels were not built: {found['cuda']['status']}")
    return {"facts": found}


def launch(device: str, site: Path) -> dict:
    difference = float(ask(LAUNCH, device, site=site))
    if not difference <= CLOSE:
        raise RuntimeError(f"rms_norm differs from torch's by {difference:.1e} of its maximum")
    return {"difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--architecture", default="")
    parser.add_argument("--site", required=True, type=Path)
    parser.add_argument("--journal", required=True, type=Path)
    arguments = parser.parse_args()
    device, site, journal = arguments.device, arguments.site, Journal(arguments.journal)
    steps = {
        "install": lambda: install(device, arguments.architecture, site),
        "facts": lambda: facts(device, site),
        "launch": lambda: launch(device, site),
    }
    journal.plan(steps)
    for name, step in steps.items():
        journal.begin(name)
        try:
            journal.end(name, **step())
        except RuntimeError as error:
            journal.error(name, str(error))
            break


if __name__ == "__main__":
    main()
