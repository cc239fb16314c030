.DEFAULT_GOAL := help
SHELL := bash

# The first Python that runs and is 3.11 or 3.12; failing that python3, and setup says what is wrong.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& echo $$p && exit; done; echo python3)
BACKEND ?= express
PORT ?= 8000
TESTS ?=

export BACKEND PORT MODEL ARGS
# Without its cache of compiled modules, every process of vLLM starts half a minute later.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup model serve test test-ops bench lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' Makefile
	@echo
	@echo '  serve:  MODEL=/folder, hub-id or gemma-3-270m PORT=8000 BACKEND=express ARGS="more vllm arguments"'
	@echo '  test:   TESTS="tests/unit/test_x.py -k name" for some of them'
	@echo '  setup:  PYTHON=python3.12, EXPRESS_DEVICE=cpu or cuda'

setup:  ## create .venv and install everything into it
	@$(PYTHON) deploy/setup.py

model: setup  ## get the small model
	@.venv/bin/python -m express_vllm.smallmodel

serve: setup  ## serve a model (by default the small one) on port 8000
	@deploy/serve.sh

test: model  ## run the tests
	.venv/bin/python -m pytest $(TESTS)

test-ops: model  ## run the tests that need Debian's chromium and prometheus, or minutes
	@$(PYTHON) deploy/setup.py lint-deploy
	.venv/bin/python -m pytest -m ops $(TESTS)

bench: model  ## measure quality against other caches, a small version
	.venv/bin/python -m bench.quality small

lint: setup  ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	deploy/mypy.sh

clean:  ## remove .venv and what was built; the model's cache stays
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
