.PHONY: bench demo docs figures install lint mutants notebooks test test-geometries test-minimum test-newest test-shapes test-slow tl-suite
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

# A file's tests stay together (they share models), one process a core, one thread each (tests/conftest.py).
test: install
	.venv/bin/python -m pytest -m "not slow and not large" -n auto --maxprocesses 4 --dist loadfile

# Tests of the port and the methods once more, with shapes and types in signatures checked at every call (tests/conftest.py).
SHAPES := positions model logit_lens readouts flip_patching knockout
test-shapes: install
	CHECK_SHAPES=1 .venv/bin/python -m pytest -m "not slow and not large" -k "not compiled" -n auto --maxprocesses 4 --dist loadfile $(SHAPES:%=tests/test_%.py)

# Notebooks, the longest commands, fuzzes; then, one after another, what needs the machine to itself: the 2B geometry, kills, nodes.
test-slow: install
	.venv/bin/python -m pytest -m "slow and not alone" -n auto --maxprocesses 2 --dist loadfile
	.venv/bin/python -m pytest -m "slow and alone"

# Qwen2.5-VL-3B and Qwen3-VL-2B with random weights: 20 GB of memory, and minutes; not among CI's.
test-geometries: install
	.venv/bin/python -m pytest -m large -s tests/test_geometries.py

# TransformerLens's own tests with this model in its bridge's place; pip downloads them. The table: docs/transformer_lens.md.
tl-suite: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python tests/tl_suite/run.py

# The oldest releases that setup.cfg allows, and the newest there are, torchvision with them, in environments of their own, with any
# PYTHON from 3.11 on. What came out: docs/environments.md. TESTS chooses some.
PYTHON ?= python3
TESTS ?= tests -m "not slow and not large" -n auto --maxprocesses 4 --dist loadfile
test-minimum: export PIP_CONSTRAINT := $(CURDIR)/tests/environments/minimum.txt
test-newest: export PIP_CONSTRAINT :=
test-minimum test-newest: test-%:
	$(PYTHON) -m venv .envs/$*
	.envs/$*/bin/pip install -q --upgrade pip
	.envs/$*/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[dev]' $(if $(filter newest,$*),torchvision)
	.envs/$*/bin/python -m pytest $(TESTS)

# Faults that a reader would miss, wrong types, and imports that point the wrong way (the contracts are in setup.cfg).
lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/pyright --pythonpath .venv/bin/python

# The site, with an API reference of every public name; a dead link is an error (--quiet would hide it from --strict): out/site.
docs: install
	.venv/bin/mkdocs build --strict

# Would the module's own tests notice a fault? A seeded sample of them, in a copy of the tree: out/mutants.
N ?= 30
SEED ?= 0
mutants: install
	.venv/bin/python tests/mutants/mutants.py $(MODULE) --n $(N) --seed $(SEED)

# Threads pinned; about an hour. The table: tests/benchmarks/benchmarks.md. BENCH="--quick --only cache".
bench: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python tests/benchmarks/run_all.py $(BENCH)

# Every notebook run on the embedded model and written with its outputs: out/notebooks/*.html, *.ipynb.
notebooks: install
	.venv/bin/python notebooks/build.py

# The pictures of README, docs/explorer.md and docs/photographs.md, each by the command that users run, in docs/images.
FIGURES := out/figures
SAMPLE := hooked_qwen2vl/scenes/samples
PHOTOGRAPH := --image "$$(.venv/bin/python -c 'from matplotlib.cbook import get_sample_data as f; print(f("grace_hopper.jpg", asfileobj=False))')" \
	--question "What color is the hat?"
figures: install
	.venv/bin/hooked-qwen2vl lens --out $(FIGURES)/lens
	.venv/bin/hooked-qwen2vl patch --out $(FIGURES)/patch
	.venv/bin/hooked-qwen2vl flips --image $(SAMPLE)/glyphs.png --question "What digit is red?" --answer 4 --out $(FIGURES)/flips
	.venv/bin/hooked-qwen2vl explore --out $(FIGURES)/explore
	.venv/bin/hooked-qwen2vl explore $(PHOTOGRAPH) --out $(FIGURES)/photograph
	.venv/bin/hooked-qwen2vl lens $(PHOTOGRAPH) --out $(FIGURES)/photograph_lens
	.venv/bin/hooked-qwen2vl ground --out $(FIGURES)/ground
	.venv/bin/python tests/page_pictures.py $(FIGURES) docs/images
	for name in lens/lens lens/lens_image patch/patch_image flips/trajectory; do cp $(FIGURES)/$$name.png docs/images/; done
