# Needs Python 3.11 or newer and nothing else: each target makes its own virtual environment, .venv.
#   make demo                      draw pictures from the bundled weights into out/demo
#   make test                      run the tests;      make test ARGS="tests/test_launch.py -x"
#   make test ARGS="-m slow"       run those that take long, which it leaves out
#   make evaluate                  measure the bundled weights, into out/evaluation
#   make lint                      check the style
#   make demo PYTHON=python3.12    with another Python
# pip takes its index, mirror and certificates from your own pip configuration.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test evaluate lint clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.core-installed
	$(BIN)/unclip demo

# On the CPU unless told otherwise: JAX_PLATFORMS=cuda make test
test: $(VENV)/.dev-installed
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

# Half an hour to two hours on a CPU: alignment with the oracle's own prompts; drawn against real pictures; the same at
# several guidances.
EVALUATE = $(BIN)/unclip evaluate --batch-size 40 --overwrite
AGAINST = --data shapes --metrics fid,kid,precision_recall,cmmd,clip_score,shapes_oracle --work out/evaluation/work
evaluate: $(VENV)/.core-installed
	$(EVALUATE) --num 200 --out out/evaluation/alignment.json $(ARGS)
	$(EVALUATE) --num 1000 $(AGAINST) --out out/evaluation/pictures.json $(ARGS)
	$(EVALUATE) --num 500 $(AGAINST) --sweep guidance=1,2,4 --out out/evaluation/sweep.json $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: unclip_jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	       "Fix: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment. Fix: install its venv module" \
	       "(Debian and Ubuntu: the package python3-venv), or give another PYTHON=..." >&2; exit 1; }

# The stamps carry the time of the last good install: a changed setup.py installs again.
$(VENV)/.core-installed: setup.py | $(BIN)/python
	@echo "installing unclip_jax into $(VENV) (about 1.3 GB, a minute or two) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev-installed: setup.py | $(BIN)/python
	@echo "installing unclip_jax and its test tools into $(VENV) (about 2.9 GB, some minutes) ..."
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.core-installed $@
