# make demo · make test · make docs · make bench · make results: each sets up everything it needs in .venv first
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
SRC    := settings.ini setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
OUT    ?= demo

.PHONY: demo test docs bench results outputs clean
demo: $(VENV)/.stamp-demo
	$(BIN)/bev_reid_demo --out $(OUT)

test: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MPLBACKEND=Agg $(BIN)/python -m pytest -n 2 --dist loadfile -p no:cacheprovider tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/nbdev_test --n_workers 2 --do_print

docs: $(VENV)/.stamp-docs
	$(BIN)/python nbs/_tools/site.py --out _docs

bench: $(VENV)/.stamp-dev
	$(BIN)/python nbs/_tools/bench

# About three hours on two cores; interrupted, it goes on
results: $(VENV)/.stamp-dev
	$(BIN)/python nbs/_tools/results.py
	$(BIN)/python nbs/_tools/results_rle.py
	$(BIN)/python nbs/_tools/results_sequences.py --run demo/standard/runs/conditions_every_condition_s? --dataset demo/standard/data/base
	$(BIN)/python nbs/_tools/results_alignment.py
	$(BIN)/python nbs/_tools/results_occupancy.py
	$(BIN)/python nbs/_tools/results_shapes.py
	$(BIN)/python nbs/_tools/results_completion.py
	$(BIN)/python nbs/_tools/results_occ_models.py

# Runs every notebook and stores its outputs; name some with NB="06_lss 07_crops", flags with FLAGS="--flags nuscenes"
outputs: $(VENV)/.stamp-docs
	$(BIN)/python nbs/_tools/outputs.py $(NB) $(FLAGS)

clean:
	rm -rf build _docs _proc *.egg-info bev_reid/*.so $(VENV)/.stamp-*

# torch first: a plain `torch` would bring gigabytes of CUDA packages
$(VENV)/.stamp-base: $(SRC)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit(f"bev_reid needs Python 3.10 to 3.12, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	@c=$${CXX:-c++}; command -v $$c >/dev/null || { echo "bev_reid builds a small C++ extension and found no compiler ($$c): install g++ or clang, or set CXX"; exit 2; }
	@echo "setting up $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt setuptools wheel pybind11
	touch $@
$(VENV)/.stamp-demo: $(VENV)/.stamp-base
	$(PIP) install -c constraints.txt -e '.[all]'
	touch $@
$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	$(PIP) install -c constraints.txt -e '.[all,dev]'
	touch $@ $(VENV)/.stamp-demo
$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	$(PIP) install -c constraints.txt -e '.[all,dev,docs]'
	touch $@
