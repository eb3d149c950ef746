"""Environment variables that must be set before Keras is imported, and the choice of slow cases."""

import gc
import os
import pathlib

import pytest

# The tests train the same small models many times: let XLA compile each program once.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# `make test-gpu` runs the tests on a GPU. Repeated runs must give equal results, with float32
# precision. Several processes share the memory of the GPU.
ON_GPU = bool(os.environ.get("KERAS_DST_GPU"))
if ON_GPU:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

# Compile without optimization: the networks are small, and optimization takes most of the test
# time. Users train with optimization, as do `make test-xla`, `make test-gpu` and the notebooks.
OPTIMIZED = ON_GPU or bool(os.environ.get("KERAS_DST_XLA_DEFAULT"))
flags = "--xla_gpu_deterministic_ops=true" if ON_GPU else ""
if not OPTIMIZED:
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def pytest_collection_finish():
    """Turn off TensorFlow's graph optimizer; keep imported objects out of garbage collection."""
    if os.environ.get("KERAS_BACKEND") == "tensorflow" and not OPTIMIZED:
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    gc.collect()
    gc.freeze()


def pytest_sessionstart(session):
    """Print the GPU of `make test-gpu`, and stop if no GPU is found."""
    if not ON_GPU:
        return
    from benchmarks.backends import card

    device = card()
    if device is None:
        pytest.exit("Expected an accelerator, because KERAS_DST_GPU is set. Found none.", 1)
    session.config.get_terminal_writer().line(f"The tests run on: {device}")


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Free the programs that JAX compiled for the tests of one file.

    Every program takes several memory mappings. Linux allows 65,530 mappings per process. JAX
    crashes with a segmentation fault if a process exceeds this number.
    """
    yield
    if os.environ.get("KERAS_BACKEND") == "jax":
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_configure(config):
    # tests/test_keras_optimizers.py runs the tests of Keras itself, which use this mark.
    config.addinivalue_line(
        "markers", "requires_trainable_backend: a Keras test that trains a model"
    )


# These tests take most of the time on TensorFlow and JAX, because both compile a training step for
# every case. On these backends `make test` runs the first N cases only; the others are marked slow.
# PyTorch compiles nothing and runs all cases.
CASES_WHERE_STEPS_ARE_COMPILED = {
    "test_resuming_from_a_final_backup_trains_no_further": 1,
    "test_a_mask_of_ones_changes_nothing": 3,
    "test_a_stripped_model_can_be_made_sparse_again_and_trains_all_weights": 3,
    "test_an_extreme_target_keeps_a_weight_of_every_layer": 3,
    "test_training_with_every_inner_optimizer": 12,
    "test_every_checkpoint_has_the_logged_sparsity": 2,
    "test_training_of_every_kind_of_model": 3,
    "test_every_sparse_layer_equals_its_stock_layer_with_masked_weights": 8,
    "test_training_with_every_compile_option": 9,
    "test_training_of_layers_with_one_weight": 2,
    "test_training_in_mixed_precision": 5,
    "test_nan_keeps_the_masks_valid": 2,
    "test_saved_and_resumed_equals_uninterrupted": 4,
    "test_the_compiled_step_is_traced_once": 4,
    "test_every_pattern_and_allocation_is_valid_or_raises": 40,
}

# On TensorFlow and JAX, `make test` runs only every n-th case of these tests. Neighboring cases
# differ in their parameters, so the chosen cases contain all parameters.
EVERY_NTH_CASE_WHERE_STEPS_ARE_COMPILED = {
    "test_an_interrupted_fit_restores_the_model": 5,
    "test_the_dropped_fraction_follows_a_cosine": 3,
    "test_frozen_layers_are_skipped": 3,
    "test_shrink_with_masks_of_an_embedding": 3,
    "test_sparsify_keeps_the_optimizer_object_and_its_state": 3,
    "test_unbuilt_layers_are_pruned_when_they_are_built": 4,
}

# On TensorFlow and JAX, `make test` runs only one case per method of these tests. The id of a case
# starts with the method. The other parameters of the chosen cases differ between methods.
ONE_CASE_PER_METHOD_WHERE_STEPS_ARE_COMPILED = {
    "test_a_custom_loop_gives_the_masks_and_weights_of_fit",
    "test_an_unstripped_model_can_be_exported",
    "test_early_stopping_with_restored_best_weights",
    "test_float64_as_default_dtype",
    "test_masks_equal_those_of_float32",
    "test_restored_weights_are_pruned_again_with_a_warning",
    "test_best_weights_at_the_target_are_restored_unchanged",
}


def pytest_collection_modifyitems(items):
    from tests.backends import COMPILES

    if not COMPILES:
        return
    tests = {}
    for item in items:
        tests.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for (_, name), cases in tests.items():
        kept = cases[: CASES_WHERE_STEPS_ARE_COMPILED.get(name)]
        kept = kept[:: EVERY_NTH_CASE_WHERE_STEPS_ARE_COMPILED.get(name, 1)]
        if name in ONE_CASE_PER_METHOD_WHERE_STEPS_ARE_COMPILED:
            methods = {}
            for item in cases:
                methods.setdefault(item.callspec.id.split("-")[0], []).append(item)
            kept = [found[i % len(found)] for i, found in enumerate(methods.values())]
        for item in cases:
            if item not in kept:
                item.add_marker(pytest.mark.slow)
