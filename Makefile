# Every target does its own set-up: Python 3.11 or newer with venv, and make, are all that it needs.

PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
BIN := .venv/bin

.PHONY: help demo test check docs bench clean

help:
	@echo "make demo    fetch two small models and show what lamina does with them"
	@echo "make test    everything that must hold: format, lint, types, tests"
	@echo "make check   the same without the tests"
	@echo "make docs    build the documentation"
	@echo "make bench   measure speed on this machine"
	@echo "make clean   remove what the above have made, but not the models fetched"

demo: $(BIN)/.installed
	$(BIN)/lamina fetch smollm2-135m minilm-l6
	$(BIN)/python examples/demo.py

test: $(BIN)/.installed-dev
	scripts/check

check: $(BIN)/.installed-dev
	scripts/check static

docs: $(BIN)/.installed-dev
	$(BIN)/python docs/build.py

bench: $(BIN)/.installed-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last, so an installation that was cut short is done again.
$(BIN)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "lamina needs Python 3.11 or newer, with its venv module" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@
