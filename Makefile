# PYTHON makes .venv (3.11 to 3.13): PYTHON=python3.12 make run. Everything else runs inside .venv.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALL := $(VENV_PYTHON) -m pip install -qq --no-input --disable-pip-version-check \
	-c .ci/constraints.txt
CPU_TORCH := --no-deps --extra-index-url https://download.pytorch.org/whl/cpu

# Waiting threads soon give up: spinning ones slow each other tenfold when programs share few cores.
export GOMP_SPINCOUNT ?= 20000

.DEFAULT_GOAL := help
.PHONY: help env run test notebooks check readme clean

help:  ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

env: .venv/stamp  ## make or update the environment .venv

# The stamp is written last: what was interrupted, or is older than the lists, is made anew.
# Without a GPU torch's CPU wheel is taken, from a folder that pip is configured to look into or
# from PyTorch's index; where neither can be reached, from the ordinary index.
.venv/stamp: requirements.txt .ci/constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		2>/dev/null || { echo "error: $(PYTHON) is no Python 3.11, 3.12 or 3.13;" \
		"PYTHON=python3.12 make env names another." >&2; exit 2; }
	@echo "making .venv (1.6 GB, 7 GB for a GPU; some minutes) ..."
	@"$(PYTHON)" -m venv --clear .venv
	@nvidia-smi -L >/dev/null 2>&1 || \
		$(INSTALL) torch $(CPU_TORCH) --retries 1 --timeout 30
	@$(INSTALL) -r requirements.txt
	@touch $@

run: env  ## run the notebooks in order as programs (some: make run NAMES="v15 v16")
	@$(VENV_PYTHON) .ci/pages.py run $(NAMES)

# The tests' cache and outputs are their own; MPLBACKEND would keep figures out of pages.
test: env  ## run all tests (some: make test ARGS="tests -k name")
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	env -u MPLBACKEND ASNN_PROFILE=tiny ASNN_CACHE="$$folder/cache" ASNN_OUTPUTS="$$folder/outputs" \
		PYTHONPATH="$(CURDIR)" $(VENV_PYTHON) -m pytest $(ARGS)

notebooks: env  ## build the .ipynb files with outputs (some: make notebooks NAMES=v15)
	@$(VENV_PYTHON) .ci/pages.py build $(NAMES)

check: env  ## say what is wrong with the .ipynb files
	@$(VENV_PYTHON) .ci/pages.py check

readme: env  ## update the README's tables
	@$(VENV_PYTHON) .ci/readme.py

clean:  ## remove the environment and all caches, but no outputs
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +
