# Set-up and checks, on a machine with only Python 3.11 or newer, pip and make. `make help` lists the targets.

PYTHON ?= python3
JOB := examples/quickstart.toml
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DOCS := .venv/.installed-docs
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install run test test-all check fix docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## set up .venv with Meshwright, PyTorch and the developer tools

run: $(INSTALLED)  ## plan, train, sample and explain examples/quickstart.toml (under 4 minutes on 2 cores)
	@set -e; \
	name=quickstart; number=2; \
	while [ -e runs/$$name ]; do name=quickstart-$$number; number=$$((number + 1)); done; \
	set -x; \
	$(BIN)/meshwright plan $(JOB); \
	$(BIN)/meshwright train $(JOB) --set run.name=$$name; \
	$(BIN)/meshwright sample runs/$$name; \
	$(BIN)/meshwright explain runs/$$name; \
	{ set +x; } 2>/dev/null; \
	echo; echo "The report: $(CURDIR)/runs/$$name/report.html (open it in a browser; it needs no network)"

test: $(INSTALLED)  ## run the test suite (about 20 minutes on 2 cores)
	$(BIN)/pytest

test-all: $(INSTALLED)  ## run the slow tests too: every layout (about an hour on 2 cores)
	$(BIN)/pytest -m ""

check: $(INSTALLED)  ## lint, formatting, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

fix: $(INSTALLED)  ## repair what lint and formatting can repair by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED_DOCS)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove .venv and everything built or cached; runs/ stays
	rm -rf .venv site dist .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call need,PYTHON CODE,MESSAGE) stops with the message where the code fails. No commas in either.
need = $(if $(shell $(PYTHON) -c '$(1)' 2>/dev/null && echo yes),,$(error $(2)))

# The stamp is written last, so an install that failed or was interrupted runs again.
$(INSTALLED): pyproject.toml constraints.txt
	$(call need,import sys; assert sys.hexversion >= 0x030b0000,$(PYTHON) is not Python 3.11 or newer: name one that is as in "make install PYTHON=python3.12")
	$(call need,import ensurepip; import venv,$(PYTHON) cannot make virtual environments: on Debian and Ubuntu "apt install python3-venv" adds that)
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e '.[train,test,dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
