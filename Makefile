# Every target makes .venv itself where it is missing; the pins are in constraints.txt.
VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?= python3

.PHONY: demo test test-long test-gpu lint package docs

demo: $(STAMP)  ## train the quickstart recipe; make demo ARGS="--max_steps 20"
	$(VENV)/bin/liger-trainer train recipes/quickstart.yaml $(ARGS)

test: $(STAMP)  ## the whole suite; without a GPU the kernels run in Triton's interpreter
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal $(ARGS)

test-long: $(STAMP)  ## every size, every model, random sequences of what users do; LIGER_SEQUENCES=500 LIGER_SEED=7 make test-long
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m long $(ARGS)

test-gpu: $(STAMP)  ## what only a GPU can test
	$(VENV)/bin/pytest -m gpu $(ARGS)

lint: $(STAMP)  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

package: $(STAMP)  ## build sdist and wheel, check them, and train from the wheel in an environment of its own
	rm -rf build dist out/package
	$(VENV)/bin/python -m build --outdir dist
	$(VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv out/package
	out/package/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd out/package && bin/liger-trainer recipes && bin/liger-trainer train quickstart --max_steps 2

docs: $(VENV)/.docs  ## the docs site, in out/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): a minute or two'
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,plots]'
	touch $@
