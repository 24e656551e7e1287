# Two commands on a fresh machine: `make chat` and `make test`. Everything else builds on them.
# Nothing but Python 3.11+ and make is needed beforehand.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: chat test check lint types format coverage docs clean system

chat: $(STAMP)
	@$(BIN)/mlxrun chat

# A file's tests stay in one process, so that what they share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

check: lint types test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

coverage: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term-missing:skip-covered

# The pages that are made: of the help texts, and of the conformance run (about a minute).
docs: $(STAMP)
	$(BIN)/python -m mlxrun.cli.reference > docs/cli.md
	$(BIN)/python -m tests.conformance.docs > docs/models.md

$(STAMP): pyproject.toml | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mlxrun needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing mlxrun into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# MLX's CPU backend on Linux needs a real BLAS to be fast (a Mac needs nothing). Installed where that
# takes no password; otherwise mlxrun says what to install and runs without.
system:
	@if [ "$$(uname)" = Linux ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			(apt-get install -y -qq libopenblas0 || \
			 { apt-get update -qq && apt-get install -y -qq libopenblas0; }) >/dev/null 2>&1 || true; \
		elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then \
			sudo -n apt-get install -y -qq libopenblas0 >/dev/null 2>&1 || true; \
		fi; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
