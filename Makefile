# Two commands: `make demo` and `make test`. Each makes .venv and installs into it what the constraints pin.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/arriero demo --overwrite

test: $(VENV)/.test lint
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "arriero needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	@touch $@

# megatron-core is an oracle of the tests: it is installed without the dependencies that only its training loop needs.
$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps megatron-core
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs/demo
