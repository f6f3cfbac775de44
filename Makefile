# Two commands: `make demo` and `make test`. Each makes .venv and installs into it what the constraints pin.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

NPU := build/npu
PEERS := build/peers

.PHONY: demo test test-quick lint docs torture npu cluster peers clean

demo: $(VENV)/.demo
	$(BIN)/arriero demo --overwrite

# A file's tests share what its fixtures build, so that each file runs on one worker.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test lint
	$(PYTEST)

# For the loop of work, in under two minutes: all tests but those that start processes or take seconds.
test-quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site in build/site, in mkdocs' strict mode: a dead link, or a page that the order leaves out, is an error.
docs: $(VENV)/.test
	$(BIN)/python scripts/write_docs.py --check
	$(BIN)/mkdocs build --quiet --strict

# A hundred kills of a run on 2 x tensor and 2 x data parallel processes: twenty-three minutes on two busy cores.
torture: $(VENV)/.demo
	$(BIN)/arriero torture --kills 100

# As root: network namespaces and a real SLURM, installed from Debian's packages.
cluster: $(VENV)/.test
	tests/cluster/install.sh
	ARRIERO_CLUSTER=1 $(BIN)/pytest tests/cluster

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
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	$(PIP) -c constraints.txt --no-deps megatron-core
	@touch $@ $(VENV)/.demo

# Optional: our calls against the real torch_npu, which needs torch's CPU build, an environment of its own, and gcc for a
# stub of the libraries that it loads. No NPU is needed; docs/npu.md says what it shows.
npu: $(NPU)/.ready
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU)/bin/python tests/npu/cann_stub.py $(NPU)/cann
	LD_LIBRARY_PATH=$(NPU)/cann $(NPU)/bin/python -m pytest tests/npu

$(NPU)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NPU)
	$(NPU)/bin/pip --disable-pip-version-check install --quiet -c constraints.txt -e . hypothesis pytest pytest-timeout pyyaml
	$(NPU)/bin/pip --disable-pip-version-check install --quiet --no-deps torch-npu==2.13.0
	@touch $@

# Optional: what benchmarks/train_cpu.py compares with. litgpt pins older versions of packages that its loop does not use.
peers: $(PEERS)/.ready

$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[bench]'
	$(PEERS)/bin/pip --disable-pip-version-check install --quiet -c constraints.txt --no-deps litgpt
	@touch $@

clean:
	rm -rf $(VENV) $(NPU) $(PEERS) runs/demo
