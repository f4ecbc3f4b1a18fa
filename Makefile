# PYTHON makes .venv (3.11 to 3.13): PYTHON=python3.12 make run. Everything else runs inside .venv.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
PIP := -m pip install -qq --no-input --disable-pip-version-check
INSTALL := $(VENV_PYTHON) $(PIP) -c .ci/constraints.txt
CPU_TORCH := --no-deps --extra-index-url https://download.pytorch.org/whl/cpu

# Waiting threads soon give up: spinning ones slow each other tenfold when programs share few cores.
export GOMP_SPINCOUNT ?= 20000

.DEFAULT_GOAL := help
.PHONY: help env run test images notebooks check readme reproduce clean

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
TESTS = folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	env -u MPLBACKEND ASNN_PROFILE=tiny ASNN_CACHE="$$folder/cache" ASNN_OUTPUTS="$$folder/outputs" \
		PYTHONPATH="$(CURDIR)" $(VENV_PYTHON) -m pytest $(ARGS)

test: env  ## run all tests (some: make test ARGS="tests -k name")
	@$(TESTS)

# The images of Kaggle and Colab, August 2026, by their own lists; torch is there a build for CUDA.
IMAGES := kaggle colab
PYTHON_kaggle := python3.12
PYTHON_colab := python3.13
PINS_kaggle := accelerate==1.13.0 datasets==4.0.0 filelock==3.29.0 fsspec==2025.3.0 \
	huggingface_hub==1.11.0 ipykernel==6.17.1 ipython==7.34.0 Jinja2==3.1.6 \
	jupyter_client==7.4.9 jupytext==1.19.1 matplotlib==3.10.0 nbclient==0.10.4 \
	nbformat==5.10.4 numpy==2.0.2 packaging==26.1 pandas==2.2.2 peft==0.19.1 psutil==5.9.5 \
	pyarrow==18.1.0 safetensors==0.7.0 scikit-learn==1.6.1 scipy==1.16.3 tensorboard==2.20.0 \
	tokenizers==0.22.2 torch==2.10.0 tqdm==4.67.3 transformers==5.0.0
PINS_colab := accelerate==1.14.0 datasets==4.0.0 filelock==3.32.3 fsspec==2025.3.0 \
	huggingface_hub==1.27.0 ipykernel==6.17.1 ipython==7.34.0 Jinja2==3.1.6 \
	jupyter_client==7.4.9 jupytext==1.19.5 matplotlib==3.10.0 nbclient==0.10.4 \
	nbformat==5.11.1 numpy==2.1.3 packaging==26.3 pandas==2.2.3 peft==0.20.0 psutil==5.9.5 \
	pyarrow==18.1.0 safetensors==0.8.0 scikit-learn==1.6.1 scipy==1.16.3 tensorboard==2.20.0 \
	tokenizers==0.22.2 torch==2.11.0 tqdm==4.67.3 transformers==5.15.0
TOOLS := 'papermill>=2.5' 'pytest>=8' 'nbval>=0.11' 'lm-eval>=0.4.10' 'tabulate>=0.9'

images: $(IMAGES:%=image-%)  ## test with the versions of Kaggle and Colab (7 GB each, on request)

# A Python is looked for on PATH, then among pyenv's; without one the image is left out.
image-%: VENV_PYTHON = .venv-$*/bin/python
image-%:
	@for python in $(PYTHON_$*) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/$(PYTHON_$*); do \
		"$$python" -c '' 2>/dev/null && break || python=; done; \
	if [ -z "$$python" ]; then echo "$* left out: there is no $(PYTHON_$*)"; exit 0; fi; \
	test -e .venv-$*/stamp || { "$$python" -m venv --clear .venv-$* && \
		$(VENV_PYTHON) $(PIP) $(PINS_$*) $(TOOLS) && touch .venv-$*/stamp; } && \
	$(TESTS)

notebooks: env  ## build the .ipynb files with outputs (some: make notebooks NAMES=v15)
	@$(VENV_PYTHON) .ci/pages.py build $(NAMES)

check: env  ## say what is wrong with the .ipynb files
	@$(VENV_PYTHON) .ci/pages.py check

readme: env  ## update the README's tables
	@$(VENV_PYTHON) .ci/readme.py

# papermill runs the page; on standard output is what it prints, its last lines the comparison.
reproduce: env  ## run a row of v18 again: make reproduce ROW=control (PROFILE=cpu SEED=42 STEPS=30)
	@notebook=$$(mktemp --suffix=.ipynb) && trap 'rm -f "$$notebook"' EXIT && \
	$(VENV_PYTHON) -m papermill --no-progress-bar --stdout-file /dev/stdout \
		notebooks/asnn_v18_ablations.ipynb "$$notebook" -p again $(ROW) \
		$(if $(PROFILE),-p profile $(PROFILE)) $(if $(SEED),-p seed $(SEED)) \
		$(if $(STEPS),-p steps $(STEPS)) 2>/dev/null

clean:  ## remove the environment and all caches, but no outputs
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +
