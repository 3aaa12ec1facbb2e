# make train: install the package and train the default experiment
# make test: install the package and run the quick tests
# make test-slow: run the slow tests: kills, damaged inputs, each mesh, core and config
# make coverage: run both and list the lines that no test runs
# make docs: build the pages in build/docs, without a network
# make pictures: draw the pictures of the pages anew
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadfile # Tests of one file share their training runs.
OWN := --ignore tests/parity # These tests need PyTorch.

.PHONY: train test test-slow coverage parity check docs pictures clean

train: .venv/installed
	$(BIN)/heedful train translate_tiny

test: .venv/installed-dev
	$(PYTEST) $(OWN)

test-slow: .venv/installed-dev
	$(PYTEST) $(OWN) -m slow

coverage: .venv/installed-dev
	$(PYTEST) $(OWN) -m "" --cov --cov-report=term:skip-covered

parity: .venv/installed-parity
	$(PYTEST) tests/parity

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pictures: .venv/installed
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-%: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
