# litvae: `make` prints what there is to make. Every target does its own set-up and a second call skips it.

# May be set on the command line, as in `make reproduce PRESET=smoke JOBS=4`.
PRESET      = quick
PAPER       = all
JOBS        =
ARGS        =
VENV        = .venv
PYTHON     ?=
MIN_DISK_GB = 9

BIN   = $(abspath $(VENV))/bin
IN    = PATH="$(BIN):$$PATH"
CORES = $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help env test reproduce figures kernels gpu docs lab export clean-notebooks clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PRESET=smoke|quick|small|paper PAPER=all|NAME JOBS=N PYTHON=PYTHON VENV=FOLDER ARGS=\"for pytest\""

env:  ## create .venv and install the pinned packages
	@VENV="$(VENV)" PYTHON="$(PYTHON)" MIN_DISK_GB="$(MIN_DISK_GB)" sh tools/setup.sh

test: env  ## run every test, the notebooks among them
	@jobs="$(or $(JOBS),$(CORES))"; [ "$$jobs" -le 8 ] || [ -n "$(JOBS)" ] || jobs=8; \
	$(IN) "$(BIN)/python" -m pytest -n "$$jobs" --dist worksteal $(ARGS)

reproduce: kernels  ## train, draw and judge the papers (PRESET=quick PAPER=all JOBS=)
	@$(IN) "$(BIN)/litvae" reproduce --preset "$(PRESET)" --paper "$(PAPER)" $(if $(JOBS),--jobs "$(JOBS)")

figures: kernels  ## the same at the preset `small`, which writes the committed figures/
	@$(IN) "$(BIN)/litvae" reproduce --preset small --paper "$(PAPER)" $(if $(JOBS),--jobs "$(JOBS)")

kernels: env  ## compile the C++ operators for this processor, where there is a compiler
	@$(IN) "$(BIN)/python" -c "from litvae.kernels.native import build_native; print(build_native())"

gpu: env  ## on a machine with a GPU: the tests that need one, and the benchmarks of the kernels
	@$(IN) "$(BIN)/python" -m pytest -m gpu tests $(ARGS)
	@$(IN) "$(BIN)/python" benchmarks/kernels.py

docs: env  ## build the site into docs/_build/html
	@$(IN) "$(BIN)/python" docs/build.py

lab: env  ## open the notebooks in JupyterLab
	@$(IN) "$(BIN)/python" -m jupyter lab nbs

export: env  ## write the package from the notebooks
	@"$(BIN)/nbdev_export"
	@"$(BIN)/python" -c "from litvae.kernels.sources import export_sources; export_sources('.')"

clean-notebooks: env  ## strip what does not belong into a commit from nbs/ and reproduce/
	@"$(BIN)/nbdev_clean" --fname nbs
	@"$(BIN)/nbdev_clean" --fname reproduce

clean:  ## remove caches and build products (keeps the environment, runs/, results/ and data)
	@rm -rf docs/_build build dist litvae.egg-info .pytest_cache
	@find . \( -path './$(VENV)' -o -path ./.git \) -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
