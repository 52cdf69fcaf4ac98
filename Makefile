# Every command a newcomer needs; each creates the environment it runs in.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint figures notebooks bench install install-dev clean

install: $(INSTALLED)
install-dev: $(INSTALLED)-dev

demo: $(INSTALLED)  ## train, evaluate, estimate the LLC and draw, in minutes on a CPU
	$(BIN)/icl demo

test: $(INSTALLED)-dev  ## the whole fast suite
	$(BIN)/pytest -q -n 2

test-slow: $(INSTALLED)-dev  ## the long checks
	$(BIN)/pytest -q -m slow

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

figures: $(INSTALLED)  ## every file under figures/ from data/
	$(BIN)/icl figures

notebooks: $(INSTALLED)-dev
	$(BIN)/pytest -q -m "" --nbmake notebooks

bench: $(INSTALLED)-dev  ## the estimator where the coefficient is known, and training under random kills
	$(BIN)/python -m benchmarks.llc_accuracy --quick
	$(BIN)/python benchmarks/kill_storm.py 20

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(INSTALLED)-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
