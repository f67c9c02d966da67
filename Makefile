# Every target sets up .venv by itself. `make fit` is the main job, `make test` is everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser
SIZE ?= 3MB
EFFORT ?= quick
MODEL ?= pocket
MINUTES ?= 40
SECONDS ?= 120
SANITIZED := build/sanitized

# The tokenisers warn when a process forks after they used threads; ours are not worth the warning.
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help setup fit test lint types unit sanitize fuzz claims claims-stale claims-check docs bench lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## .venv with the exact versions of requirements.lock

KERNELS := CMakeLists.txt $(wildcard trimtab/kernels/*/*.cpp trimtab/kernels/*/*.h)

# Torch goes in alone and first: whichever build of that version the machine offers (CPU or CUDA) then satisfies the rest.
$(READY): requirements.lock pyproject.toml $(KERNELS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed; %s is %d.%d. Choose one: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "no venv module: install python3-venv, or choose another: make PYTHON=..." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# One try: a machine without root or without a package source runs everything but the browser tests, which say so.
$(BROWSER): $(READY)
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium for the browser tests"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } </dev/null >$(VENV)/chromium.log 2>&1 \
	    || echo "chromium could not be installed (see $(VENV)/chromium.log): the browser tests will be skipped"; \
	else echo "no chromium and no way to install one: the browser tests will be skipped"; fi
	@touch $@

fit: $(READY) ## compress MODEL (the shipped pocket) into SIZE and print the evidence
	$(BIN)/trimtab fit $(MODEL) --size $(SIZE) --effort $(EFFORT)

test: lint types unit ## what continuous integration runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY) $(BROWSER)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

# Exceptions cross the sanitizers only if the C++ library is there first.
sanitize: $(READY) ## the kernels' tests on the portable variant, built with the address and undefined-behaviour sanitizers
	@if ! command -v c++ >/dev/null; then echo "no C++ compiler: nothing to sanitize"; exit 0; fi; \
	$(BIN)/cmake -G Ninja -S . -B $(SANITIZED) -DTRIMTAB_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python >/dev/null && \
	$(BIN)/cmake --build $(SANITIZED) --target _generic && \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 TRIMTAB_KERNELS=generic TRIMTAB_TEST_KERNELS=$(SANITIZED) \
	  sh -c '$(BIN)/python -m pytest -q tests/test_kernels_*.py && $(BIN)/python tests/fuzz.py weights --random --seconds 30'

fuzz: $(READY) ## hostile input for all that reads files, for SECONDS; guided by coverage where atheris installs
	@$(BIN)/python -m pip install --quiet "$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"])')" \
	  || echo "atheris does not install here: inputs are changed at random"
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

claims: $(READY) ## re-run the checks of the papers' claims here and append the results to records/
	$(BIN)/trimtab claim --all

claims-stale: $(READY) ## the same for those alone that have no record of the present code; starts none after MINUTES
	$(BIN)/trimtab claim --stale --minutes $(MINUTES)

claims-check: $(READY) ## measure those and append nothing; fails where a verdict is worse than the recorded one
	$(BIN)/trimtab claim --stale --check --minutes $(MINUTES)

docs: $(READY) ## the documentation, with the pages of the methods, in site/
	$(BIN)/python -m pip install --quiet -c requirements.lock "$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')"
	$(BIN)/python -m trimtab.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY) ## speed and memory beside the original, as ratios in one run
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

lock: $(READY) ## write requirements.lock anew from what is installed
	$(BIN)/python .ci/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) site runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
