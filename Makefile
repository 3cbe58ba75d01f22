# Everything runs in .venv; the first target that needs it makes it. PYTHON names the interpreter to build it from,
# PIP_FLAGS goes to pip (for example an index with CPU builds of PyTorch).
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit test-slow reference clean help slurm-up slurm-down test-slurm

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/installed ## the whole way on an embedded cohort: curate, pretrain, export, segment
	$(BIN)/meddino-demo --out $(or $(OUT),demo_output) $(if $(DATA),--data $(DATA))

test: lint unit ## style, types, import rules and the test suite

lint: $(VENV)/installed-dev ## ruff, mypy, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Workers and the programs that tests start compile every module anew where the environment forbids to keep bytecode.
unit: $(VENV)/installed-dev ## the test suite without what takes minutes
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm" $(PYTEST_FLAGS)

test-slow: $(VENV)/installed-dev ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PYTEST_FLAGS)

slurm-up: ## a real SLURM of two nodes on this machine (Debian or Ubuntu, root)
	slurm/test_cluster/up.sh

slurm-down: ## stop it
	slurm/test_cluster/down.sh

test-slurm: $(VENV)/installed-dev ## the tests on that SLURM; brings it up and down
	slurm/test_cluster/up.sh
	status=0; OMP_NUM_THREADS=1 timeout 2400 $(BIN)/python -m pytest -q -m slurm tests/slurm $(PYTEST_FLAGS) || status=$$?; \
		slurm/test_cluster/down.sh; exit $$status

reference: $(VENV)/installed-dev ## compare with recorded numbers: make reference RECORDS=DIR
	$(BIN)/python -m tests.reference $(RECORDS)

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	touch $@ $(VENV)/installed

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) demo_output
