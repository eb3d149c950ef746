# make demo: the main job, end to end, on real data. make test: everything, on three backends.
# Both do all their own set-up. The rest: lint, test-BACKEND, test-notebooks, notebooks, docs,
# pictures, browser, arm64, clean, and bench-NAME, below.

PYTHON ?= python3
VENV := .venv
TFMOT := .venv-tfmot
PQUANT := .venv-pquant
RUN := TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/python
BACKENDS := tensorflow jax torch
BROWSERS := chromium chromium-browser google-chrome
DEMO_READY := $(VENV)/ready-demo
TEST_READY := $(VENV)/ready-test

.PHONY: demo test lint browser arm64 docs pictures notebooks $(BACKENDS:%=test-%) test-notebooks clean
.PHONY: bench-mnist bench-methods bench-patterns bench-step bench-overhead bench-matrix
.PHONY: bench-edge bench-int8 bench-growth bench-authors bench-peers bench-across bench-energy

demo: $(DEMO_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m keras_dst demo

# Two at a time, on a thread each; what one prints comes when it is done.
test: lint browser arm64
	$(MAKE) --jobs=2 --output-sync=target $(BACKENDS:%=test-%) test-notebooks

# The HTML report is looked at in a browser; as root on a Debian, get one where there is none.
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit; done; \
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null \
	|| echo "No browser ($(BROWSERS)), nor a way to get one: the tests of the HTML report skip."

# Files are run on an emulated ARM CPU as well, where Debian's packages for it can be had.
arm64: $(TEST_READY)
	@[ -e build/arm64/ready ] || { command -v apt-get >/dev/null \
	&& rm -rf build/arm64 && tests/arm64/setup.sh build/arm64 $(VENV)/bin/python; } \
	|| echo "No emulated ARM CPU (see tests/arm64/setup.sh): its tests skip."

lint: $(TEST_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The pages, in build/site. `make test` builds them too.
docs: $(TEST_READY)
	$(VENV)/bin/python -m mkdocs build --strict

# Those in README.md and docs/benchmarks.md, of the JSON files in results/.
pictures: $(TEST_READY)
	KERAS_BACKEND=torch $(RUN) -m benchmarks.pictures

# tfmot takes no Keras 3: what is tested against it, on one backend, has an environment of its own.
test-torch: $(TFMOT)/ready

$(BACKENDS:%=test-%): test-%: $(TEST_READY)
	KERAS_BACKEND=$* OMP_NUM_THREADS=1 $(RUN) -m pytest --ignore=tests/test_notebooks.py

# Each on the backend that it chooses itself.
test-notebooks: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_notebooks.py

# Runs all of them anew and stores what they show.
notebooks: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) notebooks/execute.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[export,demo]'
	touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[all]'
	touch $@ $(DEMO_READY)

# Slow proofs, written to results/. KERAS_DST_DATA names a folder with mnist.npz, where there is no
# network for keras.datasets.
bench-mnist: $(TEST_READY)
	$(RUN) -m benchmarks.mnist_all

bench-methods: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.methods mnist
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.methods cifar10

bench-patterns: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.patterns mnist-mlp
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.patterns mnist --methods Magnitude

bench-step: $(TEST_READY)
	$(RUN) -m benchmarks.step_time small-cnn

bench-overhead: $(TEST_READY) $(TFMOT)/ready
	$(RUN) -m benchmarks.step_time resnet-20
	$(RUN) -m benchmarks.step_time lstm-128
	TF_CPP_MIN_LOG_LEVEL=3 $(TFMOT)/bin/python -m benchmarks.tfmot_step_time
	$(RUN) -m benchmarks.mask_update

$(TFMOT)/ready: constraints.txt
	$(PYTHON) -m venv $(TFMOT)
	$(TFMOT)/bin/pip install -q -c constraints.txt tensorflow tf_keras tensorflow-model-optimization==0.8.*
	touch $@

bench-matrix: $(TEST_READY)
	$(VENV)/bin/pip install -q -c constraints.txt keras-hub
	$(RUN) -m benchmarks.matrix

bench-across: $(TEST_READY)
	$(RUN) -m benchmarks.across mnist-mlp

bench-energy: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.energy

bench-growth: $(TEST_READY)
	$(RUN) -m benchmarks.growth

bench-edge: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.edge
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.grid

bench-int8: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.int8

# AUTHORS names a folder with checkouts of the repositories that benchmarks/authors.py lists.
bench-authors: $(TEST_READY)
	KERAS_BACKEND=jax $(RUN) -m benchmarks.authors dst --code $(AUTHORS)/DynamicSparseTraining
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.authors flipout --code $(AUTHORS)/flipout
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.authors optg --code $(AUTHORS)/OptG
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.authors dcil --code $(AUTHORS)/DCIL-pytorch

bench-peers: $(TEST_READY) $(TFMOT)/ready $(PQUANT)/ready
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.peers

$(PQUANT)/ready: constraints.txt
	$(PYTHON) -m venv $(PQUANT)
	$(PQUANT)/bin/pip install -q -c constraints.txt 'pquant-ml[tensorflow]==0.1.*'
	touch $@

clean:
	rm -rf $(VENV) $(TFMOT) $(PQUANT) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
