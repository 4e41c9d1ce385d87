# `make demo` and `make test` are all that a newcomer needs: each makes .venv on its first run and keeps it afterwards.
# SET=cuda takes the CUDA set of requirements/; TORCH_INDEX=URL fetches torch from another index (say, its CPU builds).
SET ?= cpu
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
REQUIREMENTS := $(wildcard requirements/*.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test check test-interpret test-gpu bench baselines format clean-venv

demo: $(VENV)/.run-$(SET)
	$(BIN)/gr sessionize configs/quickstart_log.yaml overwrite=true
	$(BIN)/gr train configs/quickstart.yaml resume=true
	$(BIN)/gr train configs/quickstart_dlrm.yaml resume=true
	$(BIN)/gr report runs/quickstart runs/quickstart_dlrm

baselines: $(VENV)/.run-$(SET)
	$(BIN)/gr sessionize configs/quickstart_log.yaml overwrite=true
	OMP_NUM_THREADS=1 $(BIN)/python -m launch sweep configs/sweeps/quickstart_baselines.yaml

test: $(VENV)/.dev-$(SET)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interpret and not slow" tests/kernels tests/gr -n 2 --dist loadgroup

test-interpret: $(VENV)/.dev-$(SET)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpret tests/kernels tests/gr

test-gpu: $(VENV)/.dev-$(SET)
	$(BIN)/python -m pytest -m "gpu or interpret"

check: $(VENV)/.dev-$(SET)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(VENV)/.dev-$(SET)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev-$(SET)
	$(BIN)/gr bench $(OP)

$(VENV)/.run-$(SET): $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "gr needs Python 3.11 or 3.12; none of python3, python3.11, python3.12 is one. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Installing into $(VENV) (once; a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) -r requirements/torch-$(SET).txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -r requirements/base.txt
	$(PIP) --no-deps -r requirements/$(SET).txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev-$(SET): $(VENV)/.run-$(SET)
	$(PIP) -r requirements/dev.txt
	touch $@
