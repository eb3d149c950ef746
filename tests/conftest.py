"""Environment variables that must be set before Keras is imported."""

import os
import pathlib

import pytest

# The tests fit the same small models again and again: let XLA compile each program once.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Compile without optimization: the networks are small, and optimizing takes most of the test time.
# Users run the default level, and so does `make test-xla`.
if not os.environ.get("KERAS_DST_XLA_DEFAULT"):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()


def pytest_configure(config):
    # Keras's own tests, which tests/test_keras_optimizers.py runs, have this mark.
    config.addinivalue_line("markers", "requires_trainable_backend: a test of Keras that trains")


# These tests take most of the time on TensorFlow and JAX, which compile every step again for every
# case. There `make test` runs the first cases only. PyTorch compiles nothing and runs all cases.
CASES_WHERE_STEPS_ARE_COMPILED = {
    "test_a_mask_of_ones_changes_nothing": 3,
    "test_a_stripped_model_is_made_sparse_again_and_every_weight_moves_in_a_step": 3,
    "test_an_extreme_target_kills_no_layer": 3,
    "test_any_inner_optimizer": 12,
    "test_every_file_has_the_sparsity_that_was_logged": 2,
    "test_every_kind_of_model": 3,
    "test_every_layer_equals_its_stock_layer_and_masks_by_its_thresholds": 8,
    "test_every_way_to_compile": 9,
    "test_layers_of_one_weight": 2,
    "test_mixed_precision": 5,
    "test_nan_keeps_the_masks_valid": 2,
    "test_saved_and_resumed_equals_uninterrupted": 4,
    "test_the_compiled_step_is_traced_once": 4,
    "test_well_defined_or_refused": 40,
}


def pytest_collection_modifyitems(items):
    from tests.backends import COMPILES

    seen = {}
    for item in items:
        name = getattr(item, "originalname", item.name)
        key = (item.path, name)
        seen[key] = seen.get(key, 0) + 1
        if COMPILES and seen[key] > CASES_WHERE_STEPS_ARE_COMPILED.get(name, seen[key]):
            item.add_marker(pytest.mark.slow)
