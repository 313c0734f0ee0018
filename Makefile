# make demo    pretrain on built-in pictures, from packing to the report
# make test    what CI runs: unit, integration and fault tests
# make quick   lint and the fast tests, about three minutes
# make daily   all tests, including those that take minutes and rarely fail
# make lint    ruff and mypy
# make gpu-check   on a machine with a GPU: check and measure everything in nine minutes (docs/performance.md)
# make gpu-check-ray   the same for what needs Ray: train, SIGTERM, resume, in six minutes
# make clean   remove the environment and the demo's results
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test quick daily lint format gpu-check gpu-check-ray clean
.DELETE_ON_ERROR:

# Install pinned versions. If $(VENV) already has a torch build of the pinned version, it is not replaced. Then compile
# all packages on all cores. Otherwise, if PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would
# compile its imports again, which takes longer than Ray waits for workers. (Files for other Python versions fail to
# compile, which does not matter.)
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

# GPU paths, in processes in which torch has an emulated CUDA device.
EMULATED := $(PY) -m pytest -n 2 -p tests.gpu_emulated.plugin tests/gpu_emulated

test: $(READY)
	$(PYTEST) --durations=25 -m "not daily" tests/integration tests/faults tests/unit
	$(EMULATED)

quick: lint
	$(PYTEST) -m "not (ray or s3 or slow or daily)" tests/unit

daily: $(READY)
	HYPOTHESIS_PROFILE=daily $(PYTEST) --durations=50 tests/integration tests/faults tests/unit
	$(EMULATED)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Without $(READY): that machine has a torch with CUDA, and the packages of the bundle.
gpu-check:
	$(PYTHON) -m tests.gpu.check --minutes 9 --out gpu-check $(if $(BUNDLE),--bundle $(BUNDLE))

gpu-check-ray:
	$(PYTHON) -m tests.gpu.check --ray --minutes 6 --out gpu-check/ray $(if $(BUNDLE),--bundle $(BUNDLE))

clean:
	rm -rf $(VENV) demo
