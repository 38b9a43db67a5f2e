# `make demo` and `make test` need nothing but Python 3.11 or newer and make:
# the first of them creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test coverage lint types docs clean

# Threads that wait asleep: on cores that other work keeps busy, spinning ones cost most of the time.
demo: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

coverage: $(INSTALLED)
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage report

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kfac needs Python 3.11 or newer; set PYTHON=/path/to/it")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
