# make demo           set up, train on the included digits, show the results
# make test           set up, check format, lint, types and the order of imports, run every test
# make lint           ruff, pyrefly and import-linter alone
# make test-minimum   run every test with the oldest versions that pyproject.toml allows
# make test-newest    run every test with the newest versions
# make test-tpu       compile for TPUs without having them, in a separate environment (libtpu is 700 MB)
# make test-gpu       compile for NVIDIA GPUs without having them, in a separate environment (CUDA's libraries are 4.5 GB)
# make test-extras    run exported files by the runtimes they are for, in a separate environment
# make test-browser   try the page of `demo` and the report in Chromium, which must be there, in a separate environment
# make docs           build the site of the pages and of the API in build/docs, in a separate environment
# make contenders     set up what the benchmarks compare with, in .venv-contenders (8 GB)
# make pins           write requirements*.txt anew from pyproject.toml and benchmarks/requirements.in
# make clean          remove all environments and what was built

PYTHON ?= python3
# The file that marks an environment as complete has the Python's version in its name: another Python needs a new one.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := .venv/installed-$(VERSION)
INSTALLED_DEV := .venv/installed-dev-$(VERSION)
WORKDIR ?= runs/digits

.PHONY: demo test test-minimum test-newest test-tpu test-gpu test-extras test-browser docs lint contenders pins clean

demo: $(INSTALLED)
	.venv/bin/python train.py --config configs/digits.py --workdir $(WORKDIR)
	.venv/bin/xception-flax evaluate $(WORKDIR) --split test
	@echo "to look at: $(WORKDIR)/report_test.html $(WORKDIR)/curves.png $(WORKDIR)/mistakes_test.png"

test: lint
	.venv/bin/python -m pytest

# Old libraries meet newer ones that they were not written for: what those call deprecated is not ours to mend.
test-minimum: $(INSTALLED_DEV)
	$(PYTHON) -m venv --clear .venv-minimum
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python .venv-minimum/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-minimum/bin/python -m pytest -W ignore::DeprecationWarning

test-newest: $(INSTALLED_DEV)
	$(PYTHON) -m venv --clear .venv-newest
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python .venv-newest/bin/python -e '.[dev]'
	.venv-newest/bin/python -m pytest

# libtpu has a separate environment, because JAX looks for TPUs at every start if it is installed.
test-tpu: .venv-tpu/installed
	.venv-tpu/bin/python -m pytest --override-ini=addopts= -ra --durations=5 tests_tpu

# CUDA's libraries are large, and no other test needs them.
test-gpu: .venv-cuda/installed
	.venv-cuda/bin/python -m pytest --override-ini=addopts= -ra --durations=5 tests_gpu

.venv-cuda/installed .venv-tpu/installed: .venv-%/installed: requirements-%.txt pyproject.toml
	@echo "installing into .venv-$* (a few minutes) ..."
	@test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt pytest
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Runtimes of other projects have a separate environment: none of them may decide which JAX the tests run with.
test-extras: .venv-extras/installed
	.venv-extras/bin/python -m pytest --override-ini=addopts= -ra --durations=5 tests_extras

# Gradio wants an older Pillow than the other tests have.
test-browser:
	@command -v chromium >/dev/null || { echo "error: chromium is missing; apt-get install chromium" >&2; exit 2; }
	@$(MAKE) --no-print-directory .venv-browser/installed
	.venv-browser/bin/python -m pytest --override-ini=addopts= -ra --durations=5 tests_browser

.venv-extras/installed .venv-browser/installed .venv-docs/installed: .venv-%/installed: requirements-%.txt pyproject.toml
	@echo "installing into .venv-$* (a few minutes) ..."
	@test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# A link that leads nowhere, a page in no contents and any other warning fail.
# Notebooks are run anew at each build, since they depend on the package too.
docs: .venv-docs/installed
	@rm -rf build/notebooks
	.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet --fresh-env \
		-c docs -d build/doctrees . build/docs
	@echo "to look at: build/docs/index.html"

lint: $(INSTALLED_DEV)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
	.venv/bin/lint-imports

contenders: $(INSTALLED) .venv-contenders/installed

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@echo "installing into .venv (a few minutes) ..."
	@.venv/bin/python --version 2>/dev/null | grep -qF ' $(VERSION).' || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	@echo "installing what the tests need into .venv ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv-contenders/installed: benchmarks/requirements.txt
	@echo "installing what the benchmarks compare with into .venv-contenders ..."
	@test -d .venv-contenders || $(PYTHON) -m venv .venv-contenders
	@.venv-contenders/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

# One list for every Python: resolved for the oldest, as the newest may want versions that it cannot install.
COMPILE := .venv/bin/uv pip compile --quiet --no-header --no-emit-index-url --python-version 3.11 --upgrade

pins: $(INSTALLED_DEV)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) pyproject.toml --extra train -o requirements.txt
	$(COMPILE) pyproject.toml --extra dev -c requirements.txt -o requirements-dev.txt
	$(COMPILE) benchmarks/requirements.in -c requirements.txt -o benchmarks/requirements.txt
	$(COMPILE) pyproject.toml --extra dev --extra export -c requirements-dev.txt -o requirements-extras.txt
	$(COMPILE) pyproject.toml --extra browser -o requirements-browser.txt
	$(COMPILE) pyproject.toml --extra docs -c requirements.txt -o requirements-docs.txt
	$(COMPILE) pyproject.toml --extra tpu -c requirements.txt -o requirements-tpu.txt
	$(COMPILE) pyproject.toml --extra cuda -c requirements.txt -o requirements-cuda.txt

clean:
	rm -rf .venv .venv-contenders .venv-minimum .venv-newest .venv-tpu .venv-cuda .venv-extras .venv-browser .venv-docs .pytest_cache build *.egg-info
