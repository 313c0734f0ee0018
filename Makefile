# make demo    pretrain on built-in pictures, from packing to the report
# make test    what CI runs: unit, integration and fault tests
# make quick   lint and the fast tests, about three minutes
# make daily   all tests, also those that take minutes and seldom fail
# make lint    ruff and mypy
# make clean   remove the environment and the demo's results
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test quick daily lint format clean
.DELETE_ON_ERROR:

# Pinned versions; a torch build that is already in $(VENV) is kept when it is of the pinned version. All is compiled, by all
# cores: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would do it again for what it imports,
# which takes longer than Ray waits for workers. (Files for other versions of Python fail, and may.)
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (a few minutes the first time)"
	@$(PY) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

demo: $(READY)
	@$(PY) jobs/demo.py

PYTEST := $(PY) -m pytest -n 2 --no-loadscope-reorder

test: $(READY)
	$(PYTEST) --durations=25 -m "not daily" tests/integration tests/faults tests/unit

quick: lint
	$(PYTEST) -m "not (ray or s3 or slow or daily)" tests/unit

daily: $(READY)
	HYPOTHESIS_PROFILE=daily $(PYTEST) --durations=50 tests/integration tests/faults tests/unit

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) demo
