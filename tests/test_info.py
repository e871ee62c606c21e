"""What `bigmodel info` tells, from this machine's facts and from samples of others'."""

import json

import pytest
import torch

from bigmodel import cli, info


def test_info_tells_what_the_install_can_do(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["native"]["isa_chosen"] in facts["native"]["isas_usable"]
    assert set(facts["native"]["isas_usable"]) <= set(facts["native"]["isas_built"])
    assert len(facts["openmp"]) == 1
    assert facts["torch"] == torch.__version__
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for shown in (facts["native"]["isa_chosen"], facts["openmp"][0], facts["cuda"]["status"], torch.__version__):
        assert shown in text


@pytest.mark.parametrize(
    "text, version",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("something else\n", None),
    ],
)
def test_driver_version_is_read_from_the_kernel_module(tmp_path, text, version):
    path = tmp_path / "version"
    path.write_text(text + "GCC version:  gcc version 12.3.0\n")
    assert info.driver_version(str(path)) == version
    assert info.driver_version(str(tmp_path / "absent")) is None


@pytest.mark.parametrize(
    "driver, verdict",
    [
        ("580.65.06", "580.65.06, needed >= 580"),
        ("570.86.15", "570.86.15, needed >= 580: too old"),
        (None, "none, needed >= 580"),
    ],
)
def test_driver_is_held_against_what_is_needed(driver, verdict):
    assert info.driver_verdict(driver) == verdict


def test_where_proc_shows_no_driver(tmp_path, monkeypatch):
    """In some containers it does not: nvidia-smi tells the version; without it CUDA still tells that there is one."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '580.65.06\\n580.65.06\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info._driver_by_nvidia_smi() == "580.65.06"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\n")
    assert info._driver_by_nvidia_smi() is None
    tool.unlink()
    assert info._driver_by_nvidia_smi() is None
    assert info.driver_verdict(None, "13.0") == "of unknown version, needed >= 580"
    assert info.driver_verdict(None, "12.8") == "of unknown version, needed >= 580: too old, for CUDA 12.8"


def test_hugepage_setting_is_the_bracketed_word(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    assert info.transparent_hugepage(str(path)) == "madvise"
    assert info.transparent_hugepage(str(tmp_path / "absent")) is None


def test_cuda_versions_are_decoded():
    assert [info.cuda_version(code) for code in (13000, 12080, 0)] == ["13.0", "12.8", None]


def test_render_shows_a_cuda_build_and_its_devices():
    facts = info.collect()
    device = {"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.1}
    facts["cuda"] = {
        "built": True,
        "status": "built with nvcc 13.0",
        "architectures": ["80-real", "90"],
        "runtime": "13.0",
        "driver_supports": "12.8",
        "driver": "570.86.15",
        "devices": [device],
    }
    text = info.render(facts)
    assert "570.86.15, needed >= 580: too old" in text
    assert "NVIDIA H100 (sm_90, 79.1 GiB)" in text
    assert "80-real 90" in text
