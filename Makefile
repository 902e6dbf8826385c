# Two commands: `make demo` (environment, then the quickstart) and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
# Without bytecode every process start pays seconds of compiling imports again.
unexport PYTHONDONTWRITEBYTECODE
# CPU PyTorch: from pip's own find-links where that is set up, else from PyTorch's CPU index, which uv knows.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
TORCH_FROM := $(if $(FIND_LINKS),--find-links $(FIND_LINKS),--torch-backend cpu)

.PHONY: demo test venv check check-slow docs clean

demo: venv
	$(BIN)/safecl run sweeps/quickstart.yaml

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-slow: venv
	$(BIN)/python -m pytest -m slow

# The pages under site/. A broken link or anchor fails.
docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

venv: $(VENV)/.ready

# A pinned closure in one pass: nothing is resolved, so nothing can drag in CUDA builds.
$(VENV)/.ready: requirements-cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "need Python 3.11 as '$(PYTHON)'; or: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) .ci/machine.py .
	@echo "making $(VENV): 240 packages, about 1.5 GB to download"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps $(TORCH_FROM) -r requirements-cpu.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	@$(BIN)/python -c "from safecl import sandbox; print(f'warning: {it}') if (it := sandbox.missing()) else None"
	@touch $@

clean:
	rm -rf $(VENV) runs
