# make train: install and train the default experiment; make test: install and run the tests;
# make coverage: the same, and the lines that no test runs;
# make test-slow: the long ones: kills, damaged inputs, every mesh, core and config.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow coverage parity check clean

train: .venv/installed
	$(BIN)/heedful train translate_tiny

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: .venv/installed-dev
	$(BIN)/pytest -n 2 -m slow

coverage: .venv/installed-dev
	$(BIN)/pytest -n 2 --cov --cov-report=term:skip-covered

parity: .venv/installed-parity
	$(BIN)/pytest tests/parity

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-%: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@
