# `make train` aligns the embedded toy model; `make test` runs the suite but for what is slow, `make test-fast` the part
# without ranks and whole runs, `make test-slow` what is left out; `make parity` compares the losses with TRL's;
# `make referee` checks the conformance kit's properties on TRL's and Liger's losses, into docs/results/referee.md;
# `make mutation` changes their formulas one by one and lists the changes that no test notices (half an hour).
# `make test-oldest` runs the fast tests with the oldest packages that pyproject.toml allows.
# `make wheel` builds wheel and sdist, and trains with the wheel in an environment of its own.
# `make release` builds them and checks that version, changelog, tag and files agree; it uploads nothing.
# `make docs` writes the documentation into out/docs; it fails on a warning.
# `make audit` looks the pinned packages up among known vulnerabilities; it fails where it cannot reach the database.
# Each sets .venv up by itself.
PYTHON ?= python3.11
PINNED ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
ARGS ?=

.PHONY: train test test-fast test-oldest test-slow parity referee mutation faults lint docs wheel release audit format clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): downloads about 1 GB of packages, which takes 2 to 6 minutes and prints nothing"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINNED) -e '.[dev,excel,gguf,lora]'
	touch $@

train: $(VENV)/.ready
	$(BIN)/python scripts/train.py $(ARGS)

FAST := "not (slow or ranks or runs or long or browser)"
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal

test: $(VENV)/.ready
	$(PYTEST) -m "not slow" $(ARGS)

test-fast: $(VENV)/.ready
	$(PYTEST) -m $(FAST) $(ARGS)

# Without GGUF files, which need newer packages.
$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev,excel,lora]'
	touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n logical --dist worksteal -m $(FAST) $(ARGS)

test-slow: $(VENV)/.ready
	$(PYTEST) -m slow $(ARGS)

$(VENV)/.parity: $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINNED) -e '.[dev,gguf,lora,parity]'
	touch $@

parity: $(VENV)/.parity
	$(BIN)/python -m pytest parity $(ARGS)

# Liger without its dependencies: the fused losses need no Triton. ARGS='--halos CHECKOUT' adds the HALOs repository's.
referee: $(VENV)/.parity
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps 'liger-kernel==0.8.*'
	$(BIN)/python -m parity.referee $(ARGS)

$(VENV)/.mutation: $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINNED) -e '.[dev,gguf,lora,mutation]'
	touch $@

mutation: $(VENV)/.mutation
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

faults: $(VENV)/.ready
	$(BIN)/python scripts/faults.py --count 50 $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel:
	rm -rf dist out/wheel
	$(PYTHON) -m venv out/wheel
	out/wheel/bin/pip install --disable-pip-version-check --quiet build
	out/wheel/bin/python -m build --outdir dist
	out/wheel/bin/pip install --disable-pip-version-check --quiet $(PINNED) dist/*.whl
	cd out/wheel && bin/halos train output_dir=run overwrite=true trainer.max_steps=2 sampling.size=16
	test -s out/wheel/run/model/model.safetensors

release: wheel
	$(VENV)/bin/python scripts/release.py

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINNED) -e '.[dev,excel,gguf,lora,docs]'
	touch $@

# The variable silences an announcement of the next major version, which the range in pyproject.toml excludes.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

$(VENV)/.audit: $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[audit]'
	touch $@

audit: $(VENV)/.audit
	$(BIN)/python scripts/audit.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) mutants .pytest_cache .mypy_cache .ruff_cache
