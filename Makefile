# One command each; `make` alone lists them.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.11 python3.12 python3.13)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# make demo PROMPT="..." CACHE=sliding_window SEED=1 DURATION=10
PROMPT ?= a red circle bouncing quickly over a navy striped background
CACHE ?= attention_sink
SEED ?= 0
DURATION ?= 60

# make test ARGS="-k resume -x"
ARGS ?=

# Waiting threads stay awake for a tenth of a millisecond, then sleep: with few cores, ones that spin on take the time of
# those that work (scripts/console.py).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT ?= 10000
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format golden bench bench-gpu docs-policies train-mini

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make .venv and install everything into it

$(STAMP): constraints.txt pyproject.toml setup.py
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  found=""; \
	  for candidate in $(PYTHONS); do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "no Python 3.11 or newer among: $(PYTHONS). Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; \
	  fi; \
	  if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make virtual environments: install its venv package (Debian: apt install python3-venv)" >&2; exit 2; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV); \
	fi; \
	echo "installing torch (the longest part)"; \
	$(PIP) torch; \
	echo "installing longtake and its tools"; \
	$(PIP) --editable '.[dev]'; \
	$(PIP) zentorch || echo "zentorch has no build for this machine: bfloat16 on the CPU takes PyTorch's attention"; \
	touch $(STAMP)

demo: $(STAMP) ## generate a 60 s video and a contact sheet from PROMPT into demo/
	@number=1; while [ -e "demo/$$(printf %03d $$number)" ]; do number=$$((number + 1)); done; \
	out="demo/$$(printf %03d $$number)"; mkdir -p demo; \
	$(OFFLINE) $(BIN)/longtake generate "$(PROMPT)" --seconds $(DURATION) --cache $(CACHE) --seed $(SEED) \
	  --contact-sheet --out "$$out" output.scale=4

test: $(STAMP) ## pass all tests
	@OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## check style, imports and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

format: $(STAMP) ## rewrite files in the house style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

golden: $(STAMP) ## regenerate the project's own golden numbers under tests/golden/
	@$(OFFLINE) $(BIN)/python tests/support/golden_cases.py

bench: $(STAMP) ## measure speed and memory on this machine (ARGS="video --seconds 30")
	@$(OFFLINE) $(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(STAMP) ## measure the real shapes with random weights on a GPU (ARGS="--seconds 30")
	@$(OFFLINE) $(BIN)/python -m benchmarks.gpu $(ARGS)

docs-policies: $(STAMP) ## rewrite docs/policies.md and its pictures
	@$(OFFLINE) $(BIN)/python docs/tools/document_policies.py

train-mini: $(STAMP) ## train the bundled mini model from scratch
	@$(BIN)/python -m lab.train_mini all
