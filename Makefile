# Two commands do everything: `make run` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/$(shell date +%Y%m%d-%H%M%S)-digits

.PHONY: help setup run test test-slow test-deployment study-small study bench clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## create .venv and install

# PYTORCH=cuda keeps pip from the CPU build's constraint, for machines with a GPU
$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(filter cuda,$(PYTORCH)),,-c constraints-cpu.txt) -e '.[dev]'
	@touch $@

run: setup ## the main job: RET on digits through `flwr run`, then central training, and a report of both
	$(BIN)/ret-fl run --preset simulations/presets/digits.toml --out $(RUN)
	$(BIN)/ret-fl run --preset simulations/presets/central.toml --engine inline --out $(RUN)-central
	$(BIN)/ret-fl report $(RUN) $(RUN)-central --baseline $(RUN)-central

test: setup ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-slow: setup ## the tests that take minutes
	$(BIN)/pytest -m slow

test-deployment: setup ## SuperLink and SuperNodes as real processes, and kill -9 of each; minutes long
	$(BIN)/pytest -m deployment

study-small: setup ## the essential evidence on digits: central, IET, IET+AGC, the default; minutes
	$(BIN)/python -m simulations.study simulations/studies/small.toml --results runs/study-small/small.jsonl

study: setup ## all studies of docs/results; hours, resumable, only what is missing
	for study in main fresh own search fine-tuning redistribution redistribution-gated quarantine duplicates plain faces gate hidden ablation aggregation; do \
	  $(BIN)/python -m simulations.study simulations/studies/$$study.toml || exit 1; done

bench: setup ## speed, as ratios measured in one run
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.audit
	$(BIN)/python -m benchmarks.server_memory
	$(BIN)/python -m benchmarks.samples
	$(BIN)/python -m benchmarks.deployment

clean: ## remove .venv and caches, keep runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
