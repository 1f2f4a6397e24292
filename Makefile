# `make demo` and `make test` install everything that they need into .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
FAULTS := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python

.PHONY: demo test tests-that-wait tests-that-work test-all test-slurm faults fuzz bench gpu check docs clean

demo: .venv/ready demo/demo.yaml
	$(BIN)/python demo/fetch_demo.py
	$(BIN)/post-dist pipeline demo/demo.yaml

# The tests of Slurm mostly wait for its timers, so they run beside the others.
test: check
	$(MAKE) --no-print-directory --jobs=2 tests-that-wait tests-that-work

tests-that-wait: .venv/ready
	$(BIN)/pytest tests/slurm -m 'not slow'

# Tests of one file stay in one worker process.
tests-that-work: .venv/ready
	$(PYTEST) -m 'not slow' --deselect tests/slurm

test-all: check
	$(PYTEST)

# Needs root on Debian 12: starts a Slurm cluster of four nodes on this machine. `test` also runs these tests, and skips them elsewhere.
test-slurm: .venv/ready
	$(BIN)/python tests/slurm/cluster.py install
	$(BIN)/pytest tests/slurm

faults: .venv/ready
	rm -rf .cache/faults
	$(FAULTS) tests/privacy/killed_runs.py .cache/faults --times 20 --table benchmarks/faults-tuning-cpu.md
	rm -rf .cache/faults
	$(FAULTS) tests/dist/killed_ranks.py .cache/faults --times 10 --table benchmarks/faults-cpu.md
	rm -rf .cache/faults
	$(FAULTS) tests/border/killed_commands.py .cache/faults
	rm -rf .cache/faults

# Sends 100,000 different hostile prompts and 2,000 students through the door, and swaps files 10,000 times. `test` sends a few hundred.
fuzz: .venv/ready
	$(FAULTS) tests/border/fuzz.py

# Compares with the committed ratios of this processor; `--write` updates them. benchmarks/scaling.py measures how costs grow.
bench: .venv/ready
	$(BIN)/python benchmarks/regression.py

# Measures all stages on one GPU in six minutes, and writes pages that carry its name. Needs no network.
gpu: .venv/ready
	$(BIN)/python benchmarks/on_gpu.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

# Writes the reference from the code, and the site to .cache/site. A dead link is an error.
SITE := README.md CHANGELOG.md CONTRIBUTING.md LICENSE constraints.txt docs benchmarks examples launch ds_configs

docs: .venv/docs-ready
	$(BIN)/python docs/reference.py
	rm -rf .cache/site-source
	mkdir -p .cache/site-source/post_dist
	cp -r $(SITE) .cache/site-source
	cp --parents post_dist/config/named_tasks.yaml post_dist/planning/hardware.yaml .cache/site-source
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is .cache/site/index.html"

.venv/docs-ready: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch .venv/docs-ready

demo/demo.yaml: examples/demo.yaml examples/fetch_demo.py | .venv/ready
	rm -f demo/demo.yaml demo/fetch_demo.py
	$(BIN)/post-dist init demo

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "post_dist needs Python 3.11 or newer: set PYTHON, or install python3.11"; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python lacks venv: install the system package python3-venv"; exit 3; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch .venv/ready

clean:
	rm -rf .venv .cache demo runs .ruff_cache .pytest_cache .import_linter_cache
