"""Tests of prunable weights and of filters that select weights."""

import keras
import numpy as np
import pytest

from keras_dst._utils.filters import is_kernel, is_prunable, select


@pytest.mark.parametrize(
    ("name", "shape", "options", "kernel"),
    [
        ("kernel", (4, 3), {}, True),
        ("kernel", (3, 3, 4, 3), {}, True),
        ("embeddings", (9, 3), {}, True),
        ("recurrent_kernel", (3, 12), {}, True),
        ("biased_kernel", (4, 3), {}, True),
        ("kernel", (4, 3), {"dtype": "bfloat16"}, True),
        ("kernel", (4, 3), {"dtype": "float16"}, True),
        ("kernel", (4, 3), {"trainable": False}, True),
        # Keras stores a quantized kernel in int8 and does not train this kernel.
        ("kernel", (4, 3), {"dtype": "int8", "trainable": False}, True),
        ("kernel", (4, 3), {"dtype": "int32", "trainable": False}, False),
        ("kernel", (4,), {}, False),
        ("bias", (2, 8), {}, False),  # Biases of attention layers have two axes.
        ("query_bias", (2, 8), {}, False),
        ("gamma", (2, 8), {}, False),
        ("beta", (2, 8), {}, False),
        ("scale", (2, 8), {}, False),
        ("alpha", (2, 8), {}, False),
        ("kernel_threshold", (4, 3), {}, False),  # DST stores its thresholds under this name.
        ("kernel_scores", (4, 3), {}, False),
        ("kernel_anchor", (4, 3), {}, False),
        ("upscale", (4, 3), {}, True),
        ("kernel_control", (4, 3), {}, False),
        ("lora_kernel_a", (4, 2), {}, False),
        ("lora_kernel_b", (2, 3), {}, False),
    ],
)
def test_kernels_are_prunable_while_they_are_trained(name, shape, options, kernel):
    variable = keras.Variable(np.zeros(shape), **{"dtype": "float32", **options}, name=name)
    assert is_kernel(variable) is kernel
    assert is_prunable(variable) is (kernel and options.get("trainable", True))


NAMES = [("conv_1", "stem/conv_1"), ("conv_2",), ("conv_2_extra",), ("head",)]


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        (None, [1, 1, 1, 1]),
        ("head", [0, 0, 0, 1]),
        ("conv_2", [0, 1, 0, 0]),  # A filter must match the whole name.
        (r"conv_\d", [1, 1, 0, 0]),
        ("conv.*", [1, 1, 1, 0]),
        (".*", [1, 1, 1, 1]),
        (["head", "conv_1"], [1, 0, 0, 1]),
        (("head", r"conv_\d"), [1, 1, 0, 1]),
        (["head", "head"], [0, 0, 0, 1]),
        ([], [0, 0, 0, 0]),
        # An item is selected if at least one of its names matches the expression.
        ("stem/.*", [1, 0, 0, 0]),
        (len, [0, 1, 1, 0]),  # A callable filter is called with each item.
    ],
)
def test_filters_select_matching_items(filters, chosen):
    items = ["", "a", "bb", ""]
    found = select(items, filters, NAMES)
    assert found == [bool(c) for c in chosen]
    assert all(type(f) is bool for f in found)


@pytest.mark.parametrize("filters", ["conv", "Head", ["head", "conv"], ""])
def test_a_filter_without_a_match_raises(filters):
    wrong = filters[-1] if isinstance(filters, list) else filters
    with pytest.raises(
        ValueError, match=f"'{wrong}' does not match any name. Names: conv_1, conv_2"
    ):
        select(NAMES, filters, NAMES)


def test_an_invalid_regular_expression_raises():
    with pytest.raises(
        ValueError, match=r"filters: 'conv\(' is not a regular expression: missing \)"
    ):
        select(NAMES, "conv(", NAMES)


@pytest.mark.parametrize("filters", [3, 0.5, {"head"}, {"head": 0.5}, [3], ["head", None]])
def test_a_filter_of_a_wrong_type_raises(filters):
    with pytest.raises(TypeError, match=r"filters must be a name, a regular expression.*Received"):
        select(NAMES, filters, NAMES)
