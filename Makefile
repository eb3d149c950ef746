# The four main commands. Each one installs its requirements in .venv.
#   make demo      train, strip, export and run a small network on real digits
#   make check     linters, types and the fast tests that need no backend: under three minutes
#   make test      the short form of all tests on three backends, three notebooks, and the pages
#   make test-all  all tests, including slow ones: many kills, every combination, all notebooks
# Also: lint, test-BACKEND, test-once, test-xla, test-notebooks, test-wheel, test-versions,
# test-gpu, notebooks, docs, pictures, browser, arm64, clean, and the benchmarks (bench-NAME) at the
# end.

PYTHON ?= python3
VENV := .venv
TFMOT := .venv-tfmot
PQUANT := .venv-pquant
TORCH_PRUNING := .venv-torch-pruning
RUN := TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/python
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest
# Some container images set PYTHONDONTWRITEBYTECODE. Without bytecode files, Python would compile
# TensorFlow, JAX and PyTorch again in every process, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE :=
BACKENDS := tensorflow jax torch
BROWSERS := chromium chromium-browser google-chrome
DEMO_READY := $(VENV)/ready-demo
TEST_READY := $(VENV)/ready-test
# Parts of the test suite. Two parts run at a time. The longest parts start first, so that both
# cores are busy until the end.
PARTS := test-torch test-tensorflow test-notebooks test-jax test-once test-xla lint
FAILED := build/failed

# Slow tests have the marker `slow`. Tests that need no backend have the marker `once`.
SLOW := and not slow
test-all: SLOW :=
# The tests of test-xla: the equations of every method, and a whole training run with one method.
OPTIMIZED := fifty or (test_target and flipout)
test-all: OPTIMIZED := fifty or target or strip
test-all: export KERAS_DST_LONG = 1
test-all: export KERAS_DST_KILLS = 10

.PHONY: demo check test test-all lint browser arm64 docs pictures notebooks clean
.PHONY: $(BACKENDS:%=test-%) test-once test-xla test-notebooks test-quick
.PHONY: test-wheel test-versions test-gpu bench-gpu
.PHONY: bench-mnist bench-methods bench-papers bench-recalibration bench-patterns bench-step bench-overhead bench-models bench-channels bench-channels-cpu bench-smaller
.PHONY: bench-tflite bench-int8 bench-micro bench-runtimes bench-scaling bench-authors bench-libraries bench-agreement bench-time-to-accuracy

demo: $(DEMO_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m keras_dst demo

check:
	$(MAKE) --jobs=2 --output-sync=target lint test-quick

# All parts of the test suite run, even if one part fails. The failed parts are listed at the end.
test test-all:
	-@$(MAKE) --keep-going --jobs=2 arm64 $(TFMOT)/ready  # so that test-torch does not start last
	rm -rf $(FAILED) && mkdir -p $(FAILED) && touch $(PARTS:%=$(FAILED)/%)
	$(MAKE) --keep-going --jobs=2 --output-sync=target SLOW="$(SLOW)" OPTIMIZED="$(OPTIMIZED)" $(PARTS) || true
	@failed=$$(ls $(FAILED) 2>/dev/null | xargs); \
	[ -z "$$failed" ] && echo "All parts passed: $(PARTS)." \
	|| { echo "Failed: $$failed. Run one alone with: make NAME"; exit 1; }

# The folder $(FAILED) contains one file for each part of the test suite that has not passed yet.
passed = @rm -f $(FAILED)/$@

# The tests of the HTML report use a browser if a browser is installed. `make browser` installs
# Chromium with apt-get, as root.
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit; done; \
	apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null

# Exported files also run on an emulated ARM CPU. Debian packages of the emulator are unpacked into
# build/arm64 and are not installed.
arm64: $(TEST_READY)
	@[ -e build/arm64/ready ] || { command -v apt-get >/dev/null \
	&& rm -rf build/arm64 && tests/arm64/setup.sh build/arm64 $(VENV)/bin/python; } \
	|| echo "No emulated ARM CPU (see tests/arm64/setup.sh): tests that need it are skipped."

lint: $(TEST_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(passed)

# Build the site in build/site. The tests also build the site.
docs: $(TEST_READY)
	$(VENV)/bin/python -m mkdocs build --strict

# Draw the pictures in README.md and docs/ from the JSON files in results/.
pictures: $(TEST_READY)
	KERAS_BACKEND=torch $(RUN) -m benchmarks.pictures

# tfmot does not accept Keras 3, so the tests that compare with tfmot use a separate environment.
test-torch: $(TFMOT)/ready

# test-xla runs tests/test_trajectories.py on JAX, so test-jax does not run this file.
OTHERS := --ignore=tests/test_notebooks.py
test-jax: OTHERS += --ignore=tests/test_trajectories.py

$(BACKENDS:%=test-%): test-%: $(TEST_READY)
	KERAS_BACKEND=$* $(PYTEST) $(OTHERS) -m "not once $(SLOW)"
	$(passed)

test-once: $(TEST_READY)
	KERAS_BACKEND=torch $(PYTEST) $(OTHERS) -m "once $(SLOW)"
	$(passed)

test-quick: $(TEST_READY)
	KERAS_BACKEND=torch $(PYTEST) $(OTHERS) -m "once and not heavy and not slow"

# Test with the default optimization level of XLA, which users have. Most tests use level 0 instead,
# which compiles fastest.
test-xla: $(TEST_READY)
	KERAS_DST_XLA_DEFAULT=1 KERAS_BACKEND=jax $(PYTEST) tests/test_trajectories.py \
	tests/test_contract.py -m "not slow" -k "$(OPTIMIZED)"
	$(passed)

# Each notebook sets its own backend.
test-notebooks: $(TEST_READY)
	$(PYTEST) tests/test_notebooks.py -m "not once $(SLOW)"
	$(passed)

# Run all notebooks again and store their outputs.
notebooks: $(TEST_READY)
	OMP_NUM_THREADS=1 $(RUN) notebooks/execute.py

# Install the wheel with each extra in a separate environment. NAMES="jax export" selects extras.
test-wheel:
	$(PYTHON) tests/environments.py wheel $(NAMES)

# Run the core tests with the oldest and the newest versions of Keras and the backends, and with JAX
# 0.11, on each installed Python. NAMES="oldest" selects one set of versions, and NAMES="3.12" one
# Python. PyTorch is skipped if pip finds only a CUDA build. KERAS_DST_CUDA=1 installs the CUDA
# build.
test-versions:
	$(PYTHON) tests/environments.py versions $(NAMES)

# Run the tests of methods, masks and checkpoints on a GPU. PYTHON must have keras, hypothesis,
# pytest, and JAX and PyTorch for the GPU, but not TensorFlow. BACKEND=jax selects a backend.
GPU_TESTS := tests/test_contract.py tests/test_trajectories.py tests/test_masks.py
GPU_TESTS += tests/test_accelerator_ranking.py tests/test_checkpoints.py tests/devices/test_devices.py
GPU_BACKENDS := jax torch
test-gpu:
	@failed=; for backend in $(or $(BACKEND),$(GPU_BACKENDS)); do \
	KERAS_DST_GPU=1 KERAS_BACKEND=$$backend $(PYTHON) -m pytest $(GPU_TESTS) -m "not slow" \
	|| failed="$$failed $$backend"; done; [ -z "$$failed" ] || { echo "Failed:$$failed"; exit 1; }

# pip does not compile the installed modules to bytecode, because most of them are never imported.
INSTALL := bin/pip install -q --no-compile -c constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/$(INSTALL) -e '.[export,demo]'
	touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/$(INSTALL) -e '.[all]'
	touch $@ $(DEMO_READY)

# Benchmarks, which write to results/. Without a network connection for keras.datasets, set
# KERAS_DST_DATA to a folder with mnist.npz.
bench-mnist: $(TEST_READY)
	$(RUN) -m benchmarks.accuracy.mnist_runs

bench-methods: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.methods mnist
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.methods cifar10

# Train the networks of one table, for example NET=resnet-32-16, or of all tables. METHOD, SPARSITY
# and SEED select runs, and RECIPE=dcil selects the recipe of the paper on DCIL. JOBS is the number
# of runs that share the GPU. The command stops after MINUTES, or when you interrupt it. The next
# command continues from the backups in BACKUP, on the same or on another machine. GPU_PYTHON names
# a Python that has keras, and JAX for the GPU. IMAGES, EPOCHS and BATCH shorten the runs. The
# results of shortened runs are not stored.
BACKUP ?= build/papers
bench-papers: $(if $(GPU_PYTHON),,$(TEST_READY))
	KERAS_BACKEND=jax $(or $(GPU_PYTHON),$(VENV)/bin/python) -m benchmarks.accuracy.papers \
	$(if $(NET),--nets $(NET)) $(if $(METHOD),--methods $(METHOD)) $(if $(SEED),--seeds $(SEED)) \
	$(if $(SPARSITY),--sparsities $(SPARSITY)) $(RECIPE:%=--recipe %) $(JOBS:%=--jobs %) \
	$(MINUTES:%=--minutes %) --backup $(BACKUP) \
	$(IMAGES:%=--images %) $(EPOCHS:%=--epochs %) $(BATCH:%=--batch %)

bench-recalibration: $(TEST_READY)
	KERAS_BACKEND=torch $(RUN) -m benchmarks.accuracy.recalibration

bench-patterns: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.patterns mnist-mlp
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.patterns mnist --methods Magnitude

bench-step: $(TEST_READY)
	$(RUN) -m benchmarks.training_cost.step_time small-cnn

bench-overhead: $(TEST_READY) $(TFMOT)/ready
	$(RUN) -m benchmarks.training_cost.step_time resnet-20
	$(RUN) -m benchmarks.training_cost.step_time lstm-128
	TF_CPP_MIN_LOG_LEVEL=3 $(TFMOT)/bin/python -m benchmarks.training_cost.tfmot_step_time
	$(RUN) -m benchmarks.training_cost.mask_update

# PYTHON must have keras, and JAX and PyTorch for the GPU. BACKEND=jax selects a backend.
bench-gpu:
	$(PYTHON) -m benchmarks.training_cost.gpu $(BACKEND:%=--backend %)

$(TFMOT)/ready: constraints.txt
	$(PYTHON) -m venv $(TFMOT)
	$(TFMOT)/$(INSTALL) tensorflow tf_keras tensorflow-model-optimization==0.8.*
	touch $@

bench-models: $(TEST_READY) $(TORCH_PRUNING)/ready
	KERAS_BACKEND=torch $(TORCH_PRUNING)/bin/python -m benchmarks.accuracy.torch_pruning count
	KERAS_BACKEND=torch $(RUN) -m benchmarks.coverage.half_channels
	$(RUN) -m benchmarks.coverage.models

# Measure the time and the memory that `shrink` needs, and the latency of the smaller models.
bench-smaller: $(TEST_READY)
	KERAS_BACKEND=tensorflow OMP_NUM_THREADS=1 $(RUN) -m benchmarks.coverage.smaller
	for backend in jax torch; do KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	$(RUN) -m benchmarks.coverage.smaller --shrink-only --networks ResNet50 || exit 1; done

# Measure methods that prune channels. The command needs a GPU and first trains a dense ResNet-56
# and VGG. Each training run is stored when it ends. If you stop the command and start it again, it
# continues with the next run.
bench-channels: $(TEST_READY) $(TORCH_PRUNING)/ready
	KERAS_BACKEND=jax $(RUN) -m benchmarks.accuracy.channels
	KERAS_BACKEND=torch $(TORCH_PRUNING)/bin/python -m benchmarks.accuracy.torch_pruning train

# Run the commands of bench-channels with short training runs on one CPU core, to show that the
# commands work.
SMALL := --nets "resnet-20, stride 2" --seeds 1 --epochs 4 2 --images 5120
bench-channels-cpu: $(TEST_READY) $(TORCH_PRUNING)/ready
	KERAS_BACKEND=torch $(RUN) -m benchmarks.accuracy.channels $(SMALL)
	KERAS_BACKEND=torch $(TORCH_PRUNING)/bin/python -m benchmarks.accuracy.torch_pruning train $(SMALL)

$(TORCH_PRUNING)/ready: constraints.txt
	$(PYTHON) -m venv $(TORCH_PRUNING)
	$(TORCH_PRUNING)/$(INSTALL) keras torch torchvision torch-pruning==1.6.*
	touch $@

bench-agreement: $(TEST_READY)
	$(RUN) -m benchmarks.accuracy.backend_agreement mnist-mlp

bench-time-to-accuracy: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.training_cost.time_to_accuracy

bench-scaling: $(TEST_READY)
	$(RUN) -m benchmarks.training_cost.scaling

bench-tflite: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.files.tflite_cases
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.files.tflite_grid

bench-int8: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.files.int8

bench-micro: $(TEST_READY)
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.files.micro

bench-runtimes: $(TEST_READY)
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(RUN) -m benchmarks.files.runtimes

# AUTHORS names a folder with checkouts of the repositories in benchmarks/accuracy/authors.py.
bench-authors: $(TEST_READY)
	KERAS_BACKEND=jax $(RUN) -m benchmarks.accuracy.authors dst --code $(AUTHORS)/DynamicSparseTraining
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.authors flipout --code $(AUTHORS)/flipout
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.authors optg --code $(AUTHORS)/OptG
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.accuracy.authors dcil --code $(AUTHORS)/DCIL-pytorch

bench-libraries: $(TEST_READY) $(TFMOT)/ready $(PQUANT)/ready
	KERAS_BACKEND=tensorflow $(RUN) -m benchmarks.comparison.libraries

$(PQUANT)/ready: constraints.txt
	$(PYTHON) -m venv $(PQUANT)
	$(PQUANT)/$(INSTALL) 'pquant-ml[tensorflow]==0.1.*'
	touch $@

clean:
	rm -rf $(VENV) $(TFMOT) $(PQUANT) $(TORCH_PRUNING) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
