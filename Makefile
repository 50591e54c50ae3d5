# Every target makes its own .venv and installs what it needs; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all bench lint clean

demo: $(READY)  ## the shipped SiT, sampled in full and with a fraction of the evaluations: a table and demo.png
	$(BIN)/python -m benchmarks.demo

test: $(READY)  ## everything that takes seconds
	$(BIN)/python -m pytest -n 2

test-all: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest -n 2 -m "not gpu"

bench: $(READY)  ## every method on every field, few samples: tables on the screen, pictures and a CSV in build/bench
	$(BIN)/python -m benchmarks.comparison --quick

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two samplers and a cache that tests run come in packages that ask for far more than these need: without dependencies.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "sencache needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
	  k-diffusion stable-diffusion-sdkit cache-dit
	@touch $@

clean:  ## forget the environment and every cache
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
