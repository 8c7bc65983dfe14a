# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow test-gpu bench gpu lint docs clean

quickstart: $(STAMP)  ## simulate, train, evaluate and draw; everything lands in runs/quick
	$(PY) examples/quickstart.py $(ARGS)

test: $(STAMP)  ## the fast tests; with Triton also those of its kernels, in its interpreter
	@$(PY) -c "import triton" 2> /dev/null || $(PY) -m pip install -q --disable-pip-version-check triton \
		|| echo "Triton is not available here: its kernels are not tested"
	$(PY) -m pytest -q -n auto --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes
	$(PY) -m pytest -q -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP)  ## the tests that need CUDA
	$(PY) -m pytest -q -n 4 -m gpu $(ARGS)

bench: $(STAMP)  ## measures speed and memory; results land in benchmarks/results
	$(PY) -m benchmarks.bench $(ARGS)

gpu: $(STAMP)  ## all that needs a GPU, as far as time goes: ARGS="--minutes 9"
	$(PY) -m benchmarks.gpu $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

docs: $(STAMP)  ## the site, in docs/_build/html; warnings are errors
	$(PY) -m sphinx -W -q -b html docs docs/_build/html

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) docs/_build
