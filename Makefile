# make setup   .venv with the package, the command `graft` and the tools of the tests
# make demo    trains full, LoRA and QLoRA on the bundled base and data
# make demo-real  teaches a real model three tasks and serves them: see examples/real_demo
# make test    lint, types, tests
# make compat  the contract tests with the oldest, a middle and the newest release of transformers
# make prove   the long proofs, run by hand and before a release; their figures go to bench/results/proofs.json
# make bench  speed and memory beside the peers on the CPU, within an hour, with nothing else running
# make docker  builds the image of the Dockerfile and tries it, where a Docker daemon runs; ARGS="--build-arg TORCH=cu130" for CUDA
# make lint | types | unit | format   one of them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo demo-real test compat prove lint types unit format bench docs docker clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard graftlm/kernels/native/*.[ch] graftlm/kernels/native/*.inc)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Graft needs Python 3.11 or newer, found {v}; run: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: setup
	$(BIN)/graft demo

demo-real: setup
	$(BIN)/python examples/real_demo/run.py

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright

unit: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

compat: setup
	$(BIN)/python tools/compat.py

prove: setup
	$(BIN)/python -m pytest -m 'prove or measured' --record --timeout 3600

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/suite.py

docs: setup
	$(BIN)/python -m graftlm.config.options_page > docs/options.md

docker:
	$(PYTHON) tools/container.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
