# Every target builds .venv by itself when it is missing or older than setup.cfg.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/shapes.yaml
RUN ?= runs/shapes

PROMPT ?= a happy cat above a red car, twemoji style

.PHONY: help venv sample page demo test check lint types clean
help:
	@echo 'make sample PROMPT="a red apple, noto style"    draw it with the shipped weights, or those of runs/shapes'
	@echo "make page    the same in a browser, on http://127.0.0.1:8000 (installs Gradio the first time)"
	@echo "make demo    train configs/shapes.yaml from nothing, sample, score, write $(RUN)/report/index.html"
	@echo "make test    the whole test suite"
	@echo "make check   lint, types and the fast tests"
	@echo "make venv    build .venv (PYTHON=$(PYTHON), needs >= 3.10)"

venv: .venv/.installed
.venv/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; name another one: make venv PYTHON=python3.11"; exit 1; }
	@echo "building .venv (PyTorch and its libraries, about 5 GB, a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,emoji,plots,metrics]"
	@touch $@

# handed on through the environment, so that quotes in a prompt stay what they are
sample: export SAMPLE_PROMPT := $(value PROMPT)
sample: venv
	$(BIN)/python sample.py "$$SAMPLE_PROMPT"

page: venv
	@$(BIN)/python -c 'import gradio' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[page]"
	$(BIN)/python serve.py --page

demo: venv
	$(BIN)/python train.py $(CONFIG) run=$(RUN)
	$(BIN)/python evaluate.py $(RUN)
	@echo "open $(RUN)/report/index.html"

test: venv
	$(BIN)/python -m pytest

check: lint types
	$(BIN)/python -m pytest -m "not slow"

lint: venv
	$(BIN)/python -m flake8
	$(BIN)/python -m isort --check-only --diff .

types: venv
	$(BIN)/python -m mypy

clean:
	rm -rf build *.egg-info .mypy_cache .pytest_cache
