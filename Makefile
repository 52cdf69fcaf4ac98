# Every command a newcomer needs; each creates the environment it runs in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-xla test-gpu lint figures notebooks docs bench install install-dev clean

install: $(INSTALLED)
install-dev: $(INSTALLED)-dev

demo: $(INSTALLED)  ## train, evaluate, estimate the LLC and draw, in minutes on a CPU
	$(BIN)/icl demo

test: $(INSTALLED)-dev  ## the whole fast suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup  # two workers with threads of their own would spin against each other

test-slow: $(INSTALLED)-dev  ## the long checks
	$(BIN)/pytest -q -m slow

test-xla: $(VENV)-xla/.installed  ## the XLA path on the CPU, in an environment of its own (torch_xla; 7 GB, minutes)
	PJRT_DEVICE=CPU $(VENV)-xla/bin/pytest -q -W default tests/xla

test-gpu:  ## on a machine with a GPU, in the environment that is active: PYTHON, torch, numpy, pandas, pydantic and pytest are enough
	$(PYTHON) -m pytest -q -rs -m cuda tests/cuda

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

figures: $(INSTALLED)  ## every file under figures/L2H4Minf*, figures/L2H4Mfin*, figures/transient-ridge and figures/calibration from data/
	$(BIN)/icl figures --stages paper

notebooks: $(INSTALLED)-dev  ## run every notebook and keep its outputs
	$(BIN)/pytest -q -m "" --nbmake --overwrite notebooks
	$(BIN)/python -m benchmarks.notebooks

docs: $(INSTALLED)-dev  ## the documentation site, into site/; open site/index.html
	$(BIN)/python docs/build_site.py

reproduction: $(INSTALLED)  ## docs/reproduction.md from data/
	$(BIN)/python -m benchmarks.reproduction

bench: $(INSTALLED)-dev  ## the estimator where the coefficient is known, and training under random kills
	$(BIN)/python -m benchmarks.llc.accuracy --quick
	$(BIN)/python benchmarks/kill_storm.py 20

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(INSTALLED)-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $(INSTALLED) $@

$(VENV)-xla/.installed: pyproject.toml
	test -x $(VENV)-xla/bin/python || $(PYTHON) -m venv $(VENV)-xla
	$(VENV)-xla/bin/pip install -q torch==2.9.0 torch_xla==2.9.0
	$(VENV)-xla/bin/pip install -q -e . pytest
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-xla build dist *.egg-info .pytest_cache .ruff_cache
