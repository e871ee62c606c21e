"""The wheel: built from the sources, it imports and computes in a clean environment with nothing on PATH."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import torch, bigmodel, sys
assert bigmodel.__file__.startswith(sys.prefix), bigmodel.__file__
x, w = torch.randn(8, 64, requires_grad=True), torch.ones(64, requires_grad=True)
for normed in (
    bigmodel.rms_norm(x, 64, w), bigmodel.layer_norm(x, 64, w, w),
    *bigmodel.add_rms_norm(x, x, 64, w), *bigmodel.add_layer_norm(x, x, 64, w, w),
):
    normed.sum().backward()
assert torch.isfinite(x.grad).all()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    settings = [f"build-dir={folder / 'build'}", "cmake.define.BIGMODEL_CUDA=OFF"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    subprocess.run(
        [*command, *(f"--config-settings={setting}" for setting in settings), str(ROOT)],
        check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (extension,) = (name for name in names if "/_C." in name)
        code = archive.read(extension)
    assert not [name for name in names if "libgomp" in name or "cudart" in name], "no runtime may travel along"
    assert b"libgomp" not in code, "OpenMP must bind to the runtime that torch has loaded"
    assert b"libcudart" not in code and b"libtorch" not in code
    assert "bigmodel/benchmarks/norm.py" in names


def test_clean_environment_without_a_compiler(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    packages = next((tmp_path / "env/lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # torch is not installed twice: the environment's own packages come first, this one's after them.
    (packages / "torch.pth").write_text("\n".join(site.getsitepackages()))
    environment = {"PATH": "", "HOME": str(tmp_path)}
    subprocess.run([python, "-c", SMOKE], check=True, env=environment, cwd=tmp_path)
    told = subprocess.run(
        [python, "-m", "bigmodel", "info"], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "not built: BIGMODEL_CUDA=OFF" in told.stdout
