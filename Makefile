# The two commands of the README, and what they are made of. Everything lands in .venv; nothing outside it is changed except the
# user's cache (built engine, fetched data), so that a second set-up takes seconds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := agent exporter host deploy tests

.PHONY: demo test board-test bench study install install-export install-optimum install-test lint types imports clean

demo: $(VENV)/.installed
	$(BIN)/joulemark demo --out demo-output

# Tests of emulated boards run in the background from the first on: the first build for boards takes minutes, and a board computes on one
# core. Beside them, first what mostly waits for processes, three at a time, then what computes, two at a time on a core each; last, with
# nothing beside it, what looks at the clock. What computes gives way to the boards, which would otherwise end long after it, on one core
# of two. The parity with transformers is first of its kind, because it takes longest; pytest-xdist
# would begin with the files that hold the most tests, and leave it for the end, with nothing beside it.
BOARDS := tests/boards
PARITY := tests/joulemark_agent/test_parity.py
WAITING := tests/browser tests/deploy tests/e2e tests/faults tests/joulemark_host
COMPUTING := $(PARITY) tests/contract tests/fuzz tests/joulemark tests/joulemark_deploy tests/joulemark_exporter tests/joulemark_http \
  tests/study tests/test_repository.py
test: $(VENV)/.installed-test
	@echo "emulated boards run beside the next tests; what they say follows after these"
	@nice -n 5 $(BIN)/python -m pytest -q $(BOARDS) >$(VENV)/boards.log 2>&1 & boards=$$!; \
	$(BIN)/python -m pytest -q -n 3 $(WAITING); waiting=$$?; \
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(COMPUTING); computing=$$?; \
	wait $$boards; boards=$$?; cat $(VENV)/boards.log; exit $$((waiting | computing | boards))
	$(BIN)/python -m pytest -q $(addprefix --ignore=,$(BOARDS) $(NIGHTLY) $(WAITING) $(COMPUTING))

# Installations for x86, and whole machines that are flashed, started, and lose their power: half an hour, so not at every change. Needs
# root, what .ci/run installs, and qemu-system-arm, ipxe-qemu, kmod, device-tree-compiler.
NIGHTLY := tests/installations tests/flashed
board-test: $(VENV)/.installed-test
	JOULEMARK_NO_SKIPS=1 $(BIN)/python -m pytest -q -x --durations=0 $(NIGHTLY)

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
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[agent,llama,xllamacpp,onnx,host,export,deploy,pi,meters,test]'
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
