# From a bare clone, with Python 3.11 to 3.13 and make: `make demo`, `make test`. The first of them creates .venv.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3 python
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help setup demo test check bench clean

help:
	@echo "make demo    train a small Llama on this machine in about 90 seconds and let it write"
	@echo "make test    lint, format, types and tests (the same as make check)"
	@echo "make setup   only create .venv, with what the tests need"
	@echo "make bench   run ours beside our peers (takes a while)"
	@echo "make clean   remove .venv and every cache"

setup: $(VENV)/.test

demo: $(VENV)/.core
	@$(BIN)/oneblock demo $(ARGS)

test: check

check: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

bench: $(VENV)/.test
	@for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
		echo "$$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A python3.x on the path may be too old, a shim that does not run, or lack venv: the first that works is taken.
$(VENV)/.python:
	@for python in $(PYTHONS); do \
		if $$python -c "$(USABLE)" >/dev/null 2>&1; then \
			echo "creating $(VENV) with $$($$python --version); this happens once"; \
			$$python -m venv $(VENV) && touch $@; exit; \
		fi; \
	done; \
	echo "error: no Python 3.11 to 3.13 with venv was found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1

# torch comes first and by itself, so that pip takes a local CPU build where there is one.
$(VENV)/.torch-$(TORCH): $(VENV)/.python
	@$(PIP) install --constraint requirements.txt torch==$(TORCH)
	@touch $@

$(VENV)/.core: $(VENV)/.torch-$(TORCH) requirements.txt pyproject.toml
	@$(PIP) install --quiet --requirement requirements.txt
	@$(PIP) install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core requirements-test.txt
	@$(PIP) install --quiet --requirement requirements-test.txt
	@touch $@
