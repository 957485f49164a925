.PHONY: bench demo test install
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export HF_HUB_OFFLINE := 1

install: .venv/installed

# torch first, then the rest: constraints.txt keeps its CPU build.
.venv/installed: setup.cfg constraints.txt pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q torch==2.13.0
	.venv/bin/pip install -q -e '.[dev]'
	touch $@

demo: install
	.venv/bin/hooked-qwen2vl lens

test: install
	.venv/bin/python -m pytest

# Threads pinned; about an hour on two cores. The table: tests/benchmarks/benchmarks.md. BENCH="--quick --only cache".
bench: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python tests/benchmarks/run_all.py $(BENCH)
