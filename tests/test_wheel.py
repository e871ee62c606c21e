"""The wheel: built from the sources, it imports and computes in a clean environment with nothing on PATH."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import release


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return release.build(folder, folder / "build", BIGMODEL_CUDA="OFF", BIGMODEL_OLD_GLIBC="ON")


def test_contents(wheel):
    assert not release.runtimes(wheel), "no runtime may travel along, and OpenMP binds to the one that torch has loaded"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "bigmodel/benchmarks/norm.py" in names
    assert {Path(name).name.split(".")[0] for name in names if name.endswith(".so")} == {"_C", "_planner"}


def test_no_module_may_ask_for_a_runtime(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("bigmodel/_C.cpython-311-x86_64-linux-gnu.so", b"libc.so.6")
        archive.writestr("bigmodel/_planner.cpython-311-x86_64-linux-gnu.so", b"libc.so.6\0libstdc++.so.6")
    assert release.runtimes(tmp_path / "some.whl") == ["libstdc++"]


def test_clean_environment_without_a_compiler(wheel, tmp_path):
    assert "not built: BIGMODEL_CUDA=OFF" in release.try_out(wheel, tmp_path / "env")


def test_published_wheels_cover_every_python_and_architecture():
    table = release.settings()
    assert table["build"].split() == [f"cp3{minor}-manylinux_*" for minor in range(10, 15)]
    assert table["linux"]["archs"] == ["x86_64", "aarch64"]
    listed = table["linux"]["environment"]["CUDAARCHS"].split(";")
    assert {entry.removesuffix("-real") for entry in listed} == {"75", "80", "86", "89", "90", "100", "120"}
    assert [entry for entry in listed if not entry.endswith("-real")] == ["90"], "PTX for what comes after"
