PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNIT := tests/unit tests/invariant
DEMO := tests/integration/test_whole_demo.py
ARGS ?=
RELEASED ?=

.PHONY: setup demo test test-gpu check bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chaccu needs Python 3.11 or newer; name one with make PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/chaccu demo $(if $(filter-out 0 no false,$(RELEASED)),--released) $(ARGS)

# In two processes, but for the demo, which trains by the clock. With ARGS one run of those.
test: setup
ifeq ($(strip $(ARGS)),)
	failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(UNIT) || failed=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/integration --ignore $(DEMO) || failed=1; \
	$(BIN)/python -m pytest $(DEMO) || failed=1; \
	exit $$failed
else
	$(BIN)/python -m pytest $(ARGS)
endif

# With the Python at hand: a machine with a GPU has its own PyTorch, and need not have what the other tests want.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu -o addopts= tests/unit/train tests/unit/engine $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(UNIT)

bench: setup
	$(BIN)/python benchmarks/bench_startup.py
	@echo 'benchmarks/bench_data.py reads dumps that are not here: see its --help'

docs: setup
	$(BIN)/python docs/build_cli_reference.py

clean:
	rm -rf $(VENV) runs
