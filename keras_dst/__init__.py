"""Sparse training for any Keras 3 model, and an exporter of smaller and faster `.tflite` files."""

import importlib
from typing import TYPE_CHECKING

from keras_dst import allocation, callbacks, layers, masks, methods, regularizers, schedules, tfmot
from keras_dst.optimizers import SparseOptimizer
from keras_dst.surgery import SparsifyReport, sparsify, strip
from keras_dst.version import __version__

# Type checkers, editors and the API reference find public names only in import statements.
if TYPE_CHECKING:
    from keras_dst import plots
    from keras_dst._reporting.sensitivity import SensitivityReport, WeightSensitivity, sensitivity
    from keras_dst._reporting.sparsity import SparsityReport, WeightReport, report
    from keras_dst._structure import (
        ChannelGroup,
        ChannelReport,
        CoupledChannels,
        GroupReport,
        ShrinkReport,
        channel_groups,
        shrink,
        shrink_report,
    )
    from keras_dst._training.drivers import couple_channels
    from keras_dst.clustering import cluster_weights
    from keras_dst.export import ExportError, ExportReport, LintReport, export_tflite
    from keras_dst.export.latency_target import LatencySearch, sparsity_at_latency
    from keras_dst.export.linter import lint
    from keras_dst.recalibration import recalibrate
    from keras_dst.sparse_files import load_sparse, save_sparse

# Import the modules for reports, export and plots on first use, because training does not need
# them.
_LAZY = {
    "load_sparse": "sparse_files",
    "save_sparse": "sparse_files",
    "ChannelGroup": "_structure",
    "ChannelReport": "_structure",
    "CoupledChannels": "_structure",
    "GroupReport": "_structure",
    "channel_groups": "_structure",
    "ExportError": "export",
    "ExportReport": "export",
    "LatencySearch": "export.latency_target",
    "LintReport": "export",
    "SensitivityReport": "_reporting.sensitivity",
    "ShrinkReport": "_structure",
    "SparsityReport": "_reporting.sparsity",
    "WeightReport": "_reporting.sparsity",
    "WeightSensitivity": "_reporting.sensitivity",
    "cluster_weights": "clustering",
    "couple_channels": "_training.drivers",
    "export_tflite": "export",
    "lint": "export",
    "recalibrate": "recalibration",
    "report": "_reporting.sparsity",
    "sensitivity": "_reporting.sensitivity",
    "shrink": "_structure",
    "shrink_report": "_structure",
    "sparsity_at_latency": "export.latency_target",
}
_LAZY_MODULES = ("plots", "tuner")

__all__ = [
    "ChannelGroup",
    "ChannelReport",
    "CoupledChannels",
    "ExportError",
    "ExportReport",
    "GroupReport",
    "LatencySearch",
    "LintReport",
    "SensitivityReport",
    "ShrinkReport",
    "SparseOptimizer",
    "SparsifyReport",
    "SparsityReport",
    "WeightReport",
    "WeightSensitivity",
    "__version__",
    "allocation",
    "callbacks",
    "channel_groups",
    "cluster_weights",
    "couple_channels",
    "export_tflite",
    "layers",
    "lint",
    "load_sparse",
    "masks",
    "methods",
    "plots",
    "recalibrate",
    "regularizers",
    "report",
    "save_sparse",
    "schedules",
    "sensitivity",
    "shrink",
    "shrink_report",
    "sparsify",
    "sparsity_at_latency",
    "strip",
    "tfmot",
]


def __getattr__(name):
    if name in _LAZY_MODULES:
        return importlib.import_module(f"keras_dst.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'keras_dst' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"keras_dst.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
