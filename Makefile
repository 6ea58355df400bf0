# make demo, make test, make check: each sets up .venv itself, and is quick when it is there already.
# Settings: PYTHON=python3.12   CUDA=1 (torch with CUDA)   TORCH_INDEX=<index with CPU builds of torch>
#           UCX=1 (with install: also UCX for RDMA lanes, without GPU packages)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UCX_STAMP := $(VENV)/.installed-ucx
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# One thread for each process: three engines share the cores, and contending threads cost more than they bring.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-deploy test-compose test-vllm vllm-env check bench reference model install clean

help:
	@echo "make demo    a real model answers across two regions, on this machine"
	@echo "make test    the tests (fetches the model once)"
	@echo "make test-deploy   the tests of console, alerts, rollout, changing clusters (Chromium, Prometheus, sshd)"
	@echo "make test-compose  the compose demo, brought up by Docker"
	@echo "make vllm-env    .venv-vllm: vLLM with this package beside it (2.5 GB)"
	@echo "make test-vllm   the tests with a real vLLM, in .venv-vllm"
	@echo "make check   lint, types, import rules"
	@echo "make reference   docs/settings.md and docs/metrics.md, from the code"
	@echo "make bench   figures: one KV lane against bare sockets"
	@echo "make clean   remove .venv and every build product (the model cache stays)"
	@echo "Settings: ARGS=... for demo and test, PYTHON=..., CUDA=1, TORCH_INDEX=..., UCX=1 (with install)"

demo: $(STAMP)
	@$(BIN)/prfaas demo $(ARGS)

# A file's tests stay in one process and in their order.
test: model
	@$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m "not deploy and not compose and not vllm" $(ARGS)

# What an operator runs around the services: console, alerts, installation, rollout (each needs something of the machine);
# and clusters that change their roles, links and versions, which take long.
test-deploy: $(STAMP)
	@$(BIN)/pytest -m deploy $(ARGS)

# By the Docker engine that answers; where none does, one is started for this, and stopped (Debian, root).
test-compose: $(STAMP)
	@if docker info >/dev/null 2>&1; then $(BIN)/pytest -m compose tests/compose $(ARGS); else \
	  engine=$$(tests/compose/engine.sh start) && eval "$$engine" && trap 'tests/compose/engine.sh stop' EXIT && \
	  $(BIN)/pytest -m compose tests/compose $(ARGS); fi

vllm-env: $(STAMP)
	@$(BIN)/python .ci/vllm_env.py

test-vllm: vllm-env model
	@.venv-vllm/bin/pytest -m "vllm and not matrix" tests/vllm $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/prfaas bench link $(ARGS)

reference: $(STAMP)
	@$(BIN)/python -m prfaas.services.commands.reference docs

model: $(STAMP)
	@$(BIN)/python -m prfaas.services.commands.fetch smollm2

install: $(STAMP) $(if $(UCX),$(UCX_STAMP))

$(STAMP): pyproject.toml setup.py constraints.txt .ci/install_torch.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "PrfaaS needs Python 3.11 or newer with venv (Debian: apt install python3-venv); the mend: make PYTHON=<path>" >&2; \
		exit 1; fi
	@[ -x $(BIN)/python ] || { echo "making $(VENV) with $(PYTHON)" && "$(PYTHON)" -m venv $(VENV); }
	@$(BIN)/python .ci/install_torch.py $(if $(CUDA),--cuda)
	@echo "installing PrfaaS and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,dev]'
	@touch $@

$(UCX_STAMP): .ci/ucx.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps -r .ci/ucx.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
