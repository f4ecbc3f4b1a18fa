# PYTHON makes .venv (Python 3.11 to 3.13): PYTHON=python3.12 make run. Everything else runs inside .venv.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

# Waiting threads soon give up: spinning ones slow each other tenfold when two programs share few cores.
export GOMP_SPINCOUNT ?= 20000

.DEFAULT_GOAL := help
.PHONY: help env run test notebooks check kaggle readme bench clean

help:  ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

env:  ## make or update the environment .venv
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "error: $(PYTHON) was not found: Python 3.11, 3.12 or 3.13 is needed, PYTHON=... names it." >&2; exit 2; }
	@"$(PYTHON)" .ci/environment.py

run: env  ## run the notebooks in order as programs (some of them: make run NAMES="v15 v16")
	@$(VENV_PYTHON) .ci/notebooks.py run $(NAMES)

# The cache and the outputs of the tests are fresh and go afterwards. MPLBACKEND would keep figures out of notebooks.
test: env  ## run all tests (some of them: make test ARGS="tests -k name")
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	env -u MPLBACKEND ASNN_PROFILE=tiny ASNN_CACHE="$$folder/cache" ASNN_OUTPUTS="$$folder/outputs" \
		PYTHONPATH="$(CURDIR)" $(VENV_PYTHON) -m pytest $(ARGS)

notebooks: env  ## build the .ipynb files with their outputs (some of them: make notebooks NAMES=v15)
	@$(VENV_PYTHON) .ci/notebooks.py build $(NAMES)

check: env  ## say what is wrong with the .ipynb files
	@$(VENV_PYTHON) .ci/notebooks.py check

kaggle: env  ## run the series on a simulated Kaggle (some of it: make kaggle NAMES="v14_4 v15")
	@$(VENV_PYTHON) .ci/kaggle.py run $(NAMES)

readme: env  ## update the README's tables
	@$(VENV_PYTHON) .ci/readme.py

bench: env  ## measure a training step and the full size
	@$(VENV_PYTHON) .ci/bench.py step
	@$(VENV_PYTHON) .ci/bench.py full
	@$(VENV_PYTHON) .ci/bench.py full --recipe v14.4-t4

clean:  ## remove the environment and all caches, but no outputs
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
