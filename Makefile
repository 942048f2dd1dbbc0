# The two commands a newcomer needs: `make demo` and `make test`. Both make the environments first if they are missing.
SHELL := /bin/bash
export OMP_NUM_THREADS ?= 1

# make demo MODEL=Qwen/Qwen2.5-0.5B-Instruct ENV=gsm8k GPUS=1     train something else
# make setup TORCH_INDEX=<index URL>                               take torch from another index, e.g. PyTorch's CPU builds
# make setup PYTHON=/usr/bin/python3.12                            use another interpreter
MODEL ?=
ENV ?=
STEPS ?=
SEED ?=
GPUS ?=
TORCH_INDEX ?=
PYTHON ?=
KILLS ?= 1000
export TORCH_INDEX PYTHON

UP = .venv/bin/lachesis up $(if $(MODEL),--model $(MODEL)) $(if $(ENV),--env $(ENV)) $(if $(STEPS),--steps $(STEPS)) \
     $(if $(SEED),--seed $(SEED)) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

.PHONY: help setup demo test-quick test test-long test-servers lint bench chaos chaos-elastic compose-test clean
help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready .venv-sglang/.ready ## make the two virtual environments (quick when they exist)
.venv/.ready: constraints/main.txt
	@tools/make-venv main
.venv-sglang/.ready: constraints/sglang.txt
	@tools/make-venv sglang

demo: setup ## train a tiny model on this machine until it can do arithmetic: a few minutes, no GPU, no download
	@$(UP)

test-quick: .venv/.ready ## lint, types, and the tests that need neither verl nor SGLang: before each commit, in three minutes
	@tools/test quick

test: setup ## everything a change must pass, and what CI runs: about 20 minutes on two cores, twice that on slow ones
	@tools/test all

test-long: setup ## the same in its long forms, with soaks, matrices, random hypotheses and coverage: before a release, some hours
	@tools/test long
	@$(MAKE) --no-print-directory chaos

test-servers: .venv/.ready ## the broker and the shim on Redis 7.0, Valkey 8, Valkey 9 and Redis 8, every test on each
	@tools/get-servers
	@.venv/bin/pytest tests/servers
	@set -e; for server in redis-7.0 valkey-8.0 valkey-9.1 redis-8.2; do if [ -x .servers/$$server/redis-server ]; then \
	  echo "== $$server"; .venv/bin/pytest tests/broker tests/shim tests/cli/test_audit.py --server $$server; fi; done

lint: .venv/.ready ## ruff, import-linter and mypy
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports --no-logo && .venv/bin/mypy && \
	  .venv/bin/mypy --config-file tests/mypy.ini tests benchmarks

bench: setup ## what hostile posts cost others, the shim beside Atropos's server, the front door, updates of a pool beside SGLang's own, what is known of the making of rollouts, the trainer around verl, replicas of it, three seeds and a control of the demo, and in lockstep (about 42 minutes); 1 where a goal is missed
	@missed=0; for part in hostile shim front_door pools lineage trainer elastic learning lockstep; do .venv/bin/python benchmarks/$$part.py || missed=1; done; exit $$missed

chaos: setup chaos-elastic ## 1,000 kills of shims, trainers and Redis, of elastic replicas, and of everything in the demo; the audits must stay clean (about 50 minutes)
	@.venv/bin/python tests/chaos/fabric.py --kills $(KILLS)
	@.venv/bin/pytest tests/loop/test_kills.py --long

chaos-elastic: .venv/.ready ## 1,000 faults of replicas that train one policy together: one trajectory, bit for bit (about 20 minutes)
	@.venv/bin/python tests/chaos/soak.py --kills $(KILLS)

compose-test: .venv/.ready ## the same loop from built images; needs a Docker engine with Compose
	@tools/compose-test

clean: ## remove environments and state
	rm -rf .venv .venv-sglang .lachesis .servers
