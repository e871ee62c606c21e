"""Who may know whom, read from the sources: the rules that CONTRIBUTING.md lists, for C++ and for Python."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "bigmodel"
OPS = sorted(path.stem for path in (CSRC / "ops").glob("*.h"))

# --- one op is one row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "home",
    [
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}.isa.cpp",
        "csrc/cuda/{}.cu",
        "python/bigmodel/ops/{}.py",
        "python/bigmodel/benchmarks/{}.py",
        "tests/ops/test_{}.py",
        "bench/bench_{}.py",
    ],
)
def test_every_op_is_in_every_folder(op, home):
    assert (ROOT / home.format(op)).is_file()


def test_folders_of_ops_hold_nothing_but_ops():
    assert sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py")) == OPS
    assert [path.name for path in (ROOT / "bench").glob("bench_*.py") if path.stem[6:] not in OPS] == []
    assert [path.name for path in (ROOT / "tests/ops").glob("test_*.py") if row_of(path.stem[5:]) is None] == []
    listed = re.search(r"set\(BIGMODEL_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed[1].split()) == OPS


# --- C++ --------------------------------------------------------------------------------------------------------------

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
FOREIGN = re.compile(r"^(torch|ATen|c10|caffe2)/|^(cublas|cudnn|cutlass|Python\.h)")


def row_of(name):
    """The op that a file belongs to: norm for norm.isa.cpp and norm_layout.cuh, None for vec.h."""
    stem = name.split(".")[0]
    return next((op for op in OPS if stem == op or stem.startswith(op + "_")), None)


def code(text):
    """C++ without comments and string literals."""
    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", " ", text, flags=re.DOTALL)


def includes(text):
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", text, flags=re.MULTILINE)


def include_violations(path, text):
    """What `path` (relative to csrc) includes and may not; system headers other than FOREIGN are free."""
    wrong = [header for header in includes(text) if FOREIGN.match(header)]
    if not path.name.startswith("bind"):
        wrong += [header for header in includes(text) if header.startswith("pybind11/")]
        wrong += [header for header in re.findall(r"#\s*include\s*\"([^\"]+)\"", text) if not may_include(path, header)]
    return wrong


def may_include(path, header):
    target = Path(os.path.normpath(path.parent / header))
    if path.parent.name == "ops":
        return target in (Path("op.h"), Path("table.h"))
    other_device = {path.parent.name, target.parent.name} == {"cpu", "cuda"}
    return not other_device and row_of(target.name) in (None, row_of(path.name))


def code_violations(path, text):
    """Words that `path` (relative to csrc) may not contain."""
    folder, name, body = path.parts[0], path.name, code(text)
    wrong = re.findall(r"cudaMalloc\w*|cuda(?:Device|Stream)Synchronize", body)
    if name != "common.cuh":
        wrong += re.findall(r"<<<|cudaLaunch\w*Kernel\w*", body)
    if folder == "cuda":
        wrong += re.findall(r"atomic(?:Add|Exch|CAS|Max|Min)\w*", body)
    if name != "parallel.h":
        wrong += re.findall(r"#\s*pragma\s+omp|\bomp_\w+", body)
    return wrong


@pytest.mark.parametrize("path", [path.relative_to(CSRC) for path in SOURCES], ids=str)
def test_cpp_file_keeps_to_its_layer(path):
    text = (CSRC / path).read_text()
    assert include_violations(path, text) == []
    assert code_violations(path, text) == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("ops/norm.h", '#include "../cpu/vec.h"'),
        ("ops/norm.h", '#include "softmax.h"'),
        ("ops/softmax.h", '#include "../ops/norm.h"'),
        ("cpu/softmax.cpp", '#include "../ops/norm.h"'),
        ("cpu/vec.h", '#include "norm_kernels.h"'),
        ("cpu/norm.cpp", '#include "../cuda/common.cuh"'),
        ("cpu/norm.cpp", "#include <pybind11/pybind11.h>"),
        ("cuda/norm.cu", "#include <torch/extension.h>"),
        ("cuda/norm.cu", "#include <ATen/ATen.h>"),
        ("bind.cpp", "#include <torch/extension.h>"),
        ("cuda/norm.cu", "kernel<<<grid, block>>>(x);"),
        ("cuda/norm.cu", "cudaLaunchKernelEx(&config, kernel);"),
        ("cuda/norm.cu", "atomicAdd(&sum, x);"),
        ("cuda/common.cuh", "cudaStreamSynchronize(stream);"),
        ("cpu/norm.cpp", "#pragma omp parallel"),
    ],
)
def test_cpp_rules_catch_what_they_forbid(path, text):
    assert include_violations(Path(path), text) or code_violations(Path(path), text)


def test_cpp_rules_read_code_and_not_comments():
    text = '#include "../ops/norm.h"\n// kernel<<<1, 1>>> /* atomicAdd */\nconst char* s = "<<<";'
    assert not include_violations(Path("cuda/norm.cu"), text) and not code_violations(Path("cuda/norm.cu"), text)


# --- Python -----------------------------------------------------------------------------------------------------------

# A module may import from the layers before its own, and from itself. bigmodel.schedule stands apart.
LAYERS = [
    {"_memory", "_native"},
    {"_check", "_registry", "info"},
    {"ops"},
    {"_attention"},
    {"nn", "optim"},
    {"_probe", "_transformers"},
    {"convert", "compat"},
    {"data"},
    {"train"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
DEPENDENCIES = {"torch", "numpy", "scipy"}  # what pyproject.toml always installs; anything else only inside functions
MODULES = sorted(PACKAGE.rglob("*.py"))
HOMES = ast.literal_eval(re.search(r"^_HOMES = (\{.*?^\})", (PACKAGE / "__init__.py").read_text(), re.M | re.S)[1])


def unit_of(path):
    """The name under bigmodel that a file belongs to: ops for ops/norm.py, __init__ for the package's own file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path, tree):
    """Every absolute dotted name that the file imports anywhere, functions included, and whether at module level."""
    package = ["bigmodel", *path.relative_to(PACKAGE).parts[:-1]]
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", id(node) in top) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((arg.value, False) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def units_imported(names):
    """The names under bigmodel that those imports reach, through its lazily resolved names too."""
    for name in names:
        parts = name.split(".")
        if parts[0] != "bigmodel" or parts[1:] in (["__version__"], ["_C"], ["_planner"]):
            continue
        if len(parts) == 1:
            yield from {home.split(".")[1] for home in HOMES.values()}
        else:
            yield HOMES.get(parts[1], f"bigmodel.{parts[1]}").split(".")[1]


def python_violations(path, text):
    unit, tree = unit_of(path), ast.parse(text)
    found = list(imported_names(path, tree))
    units = {imported for imported in units_imported(name for name, _ in found) if imported != unit}
    if unit == "__init__":
        wrong = [f"imports {name}" for name, _ in found if name.split(".")[0] not in sys.stdlib_module_names]
    elif unit == "schedule":
        wrong = [f"imports bigmodel.{name}" for name in units]
        wrong += [f"imports {name}" for name, _ in found if name.split(".")[0] == "torch"]
    elif unit not in RANK:
        wrong = [f"bigmodel.{unit} has no layer; give it one in LAYERS"]
    else:
        wrong = [f"imports bigmodel.{name}" for name in units if RANK.get(name, -1) >= RANK[unit]]
    if path.parent.name == "ops" and not path.name.startswith("_"):
        siblings = {f"bigmodel.ops.{op}" for op in OPS} - {f"bigmodel.ops.{path.stem}"}
        wrong += [f"imports {name}" for name, _ in found if ".".join(name.split(".")[:3]) in siblings]
    free = DEPENDENCIES | {"bigmodel"} | sys.stdlib_module_names
    wrong += [f"imports {name} at module level" for name, top in found if top and name.split(".")[0] not in free]
    if unit != "_registry":
        reached = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        wrong += [f"uses {name}" for name in reached | {name for name, _ in found} if name.startswith("torch.library")]
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_file_keeps_to_its_layer(path):
    assert python_violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("__init__.py", "import torch"),
        ("__init__.py", "from bigmodel import ops"),
        ("_native.py", "def f():\n    from bigmodel import _registry"),
        ("_registry.py", "from . import ops"),
        ("ops/norm.py", "from bigmodel.nn import RMSNorm"),
        ("ops/norm.py", "import bigmodel"),
        ("ops/softmax.py", "from bigmodel.ops.norm import rms_norm"),
        ("ops/softmax.py", "from ..ops import norm"),
        ("nn.py", "from bigmodel import convert"),
        ("nn.py", "import bigmodel.optim"),
        ("convert.py", "def f():\n    from importlib import import_module\n    import_module('bigmodel.cli')"),
        ("schedule/solve.py", "def f():\n    import torch"),
        ("schedule/solve.py", "from bigmodel import info"),
        ("newcomer.py", ""),
        ("convert.py", "import transformers"),
        ("train/loop.py", "from matplotlib import pyplot"),
        ("ops/norm.py", "import torch\ntorch.library.Library('x', 'DEF')"),
        ("ops/norm.py", "from torch.library import Library"),
    ],
)
def test_python_rules_catch_what_they_forbid(path, text):
    assert python_violations(PACKAGE / path, text)


@pytest.mark.parametrize(
    "path, text",
    [
        ("ops/norm.py", "from bigmodel import _registry\nfrom bigmodel._native import DTYPE_CODES"),
        ("convert.py", "import numpy\ndef f():\n    import transformers"),
        ("benchmarks/norm.py", "import bigmodel\nfrom bigmodel import layer_norm"),
        ("compat/apex/contrib/__init__.py", "from bigmodel.compat.apex import normalization"),
    ],
)
def test_python_rules_allow_what_they_should(path, text):
    assert python_violations(PACKAGE / path, text) == []


@pytest.mark.parametrize("module", ["bigmodel", *(["bigmodel.schedule"] if (PACKAGE / "schedule").is_dir() else [])])
def test_importing_needs_no_torch(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
