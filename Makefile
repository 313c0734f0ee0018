# make demo    pretrain on built-in pictures, from packing to the report
# make test    what CI runs: unit, integration and fault tests
# make quick   lint and the fast tests, about three minutes
# make daily   all tests, including those that take minutes and rarely fail
# make fuzz    search for hostile input that is not refused, for FUZZ_SECONDS (10 minutes by default)
# make lint    ruff and mypy
# make gpu-check   on a machine with a GPU: check and measure everything in nine minutes (docs/performance.md)
# make gpu-check-ray   the same for what needs Ray: train, SIGTERM, resume, in six minutes
# make lock    write requirements*.lock again, after a change of constraints.txt or of pyproject.toml
# make sbom    write build/sbom.json, what the environment holds, as CycloneDX
# make licences   list the licence of each package
# make audit   look the locked versions up among known vulnerabilities
# make clean   remove the environment and the demo's results
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
READY := $(VENV)/.ready
TOOLS := build/tools

.PHONY: demo test quick daily fuzz lint format gpu-check gpu-check-ray lock sbom licences audit clean
.DELETE_ON_ERROR:

# Install the locked files: pip refuses a file whose digest is not in the lock. torch has builds for CUDA, ROCm and CPUs,
# which differ, so only its version is pinned; a build of that version that $(VENV) already has is not replaced. Then
# compile all packages on all cores. Otherwise, if PYTHONDONTWRITEBYTECODE is set, as in many containers, each process
# would compile its imports again, which takes longer than Ray waits for workers. (Files for other Python versions fail
# to compile, which does not matter.)
$(READY): pyproject.toml constraints.txt requirements.lock requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (a few minutes the first time)"
	@$(PIP) --no-compile --no-deps --require-hashes -r requirements.lock -r requirements-dev.lock
	@$(PIP) --no-compile -c constraints.txt "$$(grep ^torch== constraints.txt)"
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(PY) -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $@

demo: $(READY)
	@$(PY) jobs/demo.py

PYTEST := $(PY) -m pytest -n 2 --no-loadscope-reorder

# GPU paths, in processes in which torch has an emulated CUDA device.
EMULATED := $(PY) -m pytest -n 2 -p tests.gpu_emulated.plugin tests/gpu_emulated

test: $(READY)
	$(PYTEST) --durations=25 -m "not daily" tests/integration tests/faults tests/unit tests/fuzz
	$(EMULATED) -m "not daily"

quick: lint
	$(PYTEST) -m "not (ray or s3 or slow or daily)" tests/unit

daily: $(READY)
	HYPOTHESIS_PROFILE=daily $(PYTEST) --durations=50 tests/integration tests/faults tests/unit tests/fuzz
	$(EMULATED)

FUZZ_SECONDS ?= 600
fuzz: $(READY)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest --timeout 0 tests/fuzz

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

# The locks hold digests of all files of each pinned version, for every platform: requirements.lock of what a run needs,
# the other two of what development and the tools below need besides. Left out are torch, and what only some of its
# builds need (NVIDIA's libraries; triton, which tests need, is in the second).
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" $(TOOLS)/bin/uv pip compile -q --universal --python-version 3.11 --no-annotate
HASHES := $(COMPILE) --no-deps --generate-hashes --no-emit-package torch -

lock: $(TOOLS)/.ready
	@sed '/^\#/d; s/_/-/g' constraints.txt | tr A-Z a-z >build/pins
	@$(COMPILE) pyproject.toml --extra server -c constraints.txt -o build/resolved >build/log
	@sed 's/ *;.*//' build/resolved | grep -xFf build/pins | grep -v ^triton= >build/needed
	@$(HASHES) <build/needed -o requirements.lock >build/log
	@grep -vxFf build/needed build/pins | \
	  sed "s/^triton=.*/&; sys_platform == 'linux' and platform_machine == 'x86_64'/" | \
	  $(HASHES) -o requirements-dev.lock >build/log
	@$(COMPILE) --generate-hashes --group tools -o requirements-tools.lock >build/log

sbom: $(READY) $(TOOLS)/.ready
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.json $(PY)

licences: $(READY) $(TOOLS)/.ready
	@$(TOOLS)/bin/pip-licenses --python $(PY) --from mixed

audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r requirements-dev.lock

$(TOOLS)/.ready: requirements-tools.lock
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-tools.lock
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) demo
