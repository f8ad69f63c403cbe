# The newest Python on which all dependencies install, pyenv's included: PYTHON=... names another.
PYTHON ?= $(shell for minor in 13 12 11; do \
	for python in python3.$$minor $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.$$minor.*/bin/python python3; do \
	"$$python" -c "import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null && echo "$$python" && exit; \
	done; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
# Large pages make training steps on CPUs up to 1.7 times faster (glibc 2.35 or newer).
TUNED := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: demo test lint clean

demo: $(VENV)/.installed-train
	$(TUNED) $(BIN)/python train.py --config=configs/demo.py --workdir=runs/demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n 2 --doctest-modules falcon_jax tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.installed-train: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed-train
	$(BIN)/pip install --quiet -e ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) runs
