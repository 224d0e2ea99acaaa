# The two commands of the README, and what they are made of. Everything lands in .venv; nothing outside it is changed except the
# user's cache (built engine, fetched data), so that a second set-up takes seconds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := agent exporter host deploy tests

.PHONY: demo test bench study install install-export install-optimum install-test lint types imports clean

demo: $(VENV)/.installed
	$(BIN)/joulemark demo --out demo-output

# Tests that mostly wait for processes run three at a time; those that compute beside those of emulated boards, which compute on one core;
# those that look at the clock one after the other.
BOARDS := tests/boards
PARITY := tests/joulemark_agent/test_parity.py
WAITING := tests/browser tests/deploy tests/e2e tests/faults tests/joulemark_host
COMPUTING := tests/contract tests/joulemark tests/joulemark_deploy tests/joulemark_exporter tests/joulemark_http tests/study
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 3 $(WAITING)
	@echo "emulated boards run beside the next tests; what they say follows"
	@$(BIN)/python -m pytest -q $(BOARDS) >$(VENV)/boards.log 2>&1 & boards=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(COMPUTING); computing=$$?; \
	$(BIN)/python -m pytest -q $(PARITY); parity=$$?; \
	wait $$boards; boards=$$?; cat $(VENV)/boards.log; exit $$((computing | parity | boards))
	$(BIN)/python -m pytest -q $(addprefix --ignore=,$(BOARDS) $(WAITING) $(COMPUTING) $(PARITY))

bench: $(VENV)/.installed-test
	$(BIN)/python -m tests.bench

study: $(VENV)/.installed-test
	$(BIN)/python -m tests.study

install: $(VENV)/.installed
install-export: $(VENV)/.installed-export
install-optimum: $(VENV)-optimum/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml deploy/build_engine.py deploy/engine_only.cmake | $(BIN)/python
	$(BIN)/python deploy/build_engine.py
	@echo "installing joulemark and what it needs (a minute at most)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[agent,llama,host]'
	@touch $@

$(VENV)/.installed-export: $(VENV)/.installed
	@echo "installing what the exporter needs (torch, transformers, onnx: a few minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[agent,llama,onnx,host,export]'
	@touch $@

# Beside the other environment, where the exporter looks for it: optimum's exporter needs a transformers that is older than the exporter's.
$(VENV)-optimum/.installed: pyproject.toml
	@echo "installing optimum in an environment of its own (torch once more: a minute or two)"
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(VENV)-optimum/bin/python -m pip install -q --disable-pip-version-check -e '.[export-optimum]'
	@touch $@

# torch is named with its exact version: the newest one is a build of several gigabytes for graphics cards.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need (torch and transformers for the comparison: a few minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[agent,llama,onnx,host,export,deploy,pi,meters,test]'
	@touch $@

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed-test
	$(BIN)/pyright

imports: $(VENV)/.installed-test
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VENV)-optimum demo-output study-output build dist
