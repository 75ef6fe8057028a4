PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: install demo test test-all slurm-test parity lint bench docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

# The road end to end on real images: prepare, train, export, load the export back, evaluate beside two baselines.
demo: install
	rm -rf $(DEMO)
	$(BIN)/jaxmed prepare demo --out $(DEMO)/corpus
	$(BIN)/jaxmed train experiments/demo.py --data $(DEMO)/corpus --out $(DEMO)/run
	$(BIN)/jaxmed evaluate $(DEMO)/run --data $(DEMO)/corpus --label region --out $(DEMO)/evaluation.json > $(DEMO)/table.txt
	$(BIN)/jaxmed export $(DEMO)/run --format channelvit --out $(DEMO)/encoder.safetensors
	$(BIN)/jaxmed embed $(DEMO)/encoder.safetensors --data $(DEMO)/corpus --split test --out $(DEMO)/features.npz
	@cat $(DEMO)/table.txt
	@echo "exported file: $(DEMO)/encoder.safetensors (card: $(DEMO)/encoder.md)"

# A worker more than there are cores: one waits for the processes or disks of its test while the others compute.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# The first tier: every room and the road end to end, at most ten minutes on two cores (tests/tiers.py).
test: $(VENV)/.test
	$(PYTEST) -m 'not slow' --guard tests --ignore tests/parity

test-all: $(VENV)/.test
	$(PYTEST) tests --ignore tests/parity

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

# Against a real SLURM, which is installed (Debian, as root) and started on this machine for as long as the tests take.
# Where it cannot be had the tests say so and are skipped.
slurm-test: $(VENV)/.test
	-tools/slurm_here.sh
	$(BIN)/python -m pytest -q -m slurm tests/launch/test_slurm.py tests/launch/test_studies.py tests/data/test_cluster.py; code=$$?; tools/slurm_here.sh stop; exit $$code

# Against the real PyTorch classes. The extra is large, so it has a target of its own.
parity: $(VENV)/.parity
	$(PYTEST) tests/parity

$(VENV)/.parity: $(VENV)/.test
	$(BIN)/pip install -q -e '.[test,parity]'
	-$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/peers solo-learn==1.0.2  # its pins fit nothing else here
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy jaxmed
	$(BIN)/lint-imports

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[lint]'
	@touch $@

bench: $(VENV)/.parity
	$(BIN)/python tools/bench_step.py

# The site, in site/: a broken link or a page that the navigation lacks ends it.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
