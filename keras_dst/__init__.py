"""Sparse training for any Keras 3 model, and the way to a smaller, faster `.tflite`."""

from keras_dst import (
    allocation,
    callbacks,
    layers,
    masks,
    methods,
    plots,
    regularizers,
    schedules,
    tfmot,
)
from keras_dst.export import ExportError, ExportReport, LintReport, export_tflite, lint
from keras_dst.optimizers import SparseOptimizer
from keras_dst.report import SparsityReport, report
from keras_dst.shrink import ShrinkReport, shrink, shrink_report
from keras_dst.surgery import SparsifyReport, sparsify, strip
from keras_dst.version import __version__

__all__ = [
    "ExportError",
    "ExportReport",
    "LintReport",
    "ShrinkReport",
    "SparseOptimizer",
    "SparsifyReport",
    "SparsityReport",
    "__version__",
    "allocation",
    "callbacks",
    "export_tflite",
    "layers",
    "lint",
    "masks",
    "methods",
    "plots",
    "regularizers",
    "report",
    "schedules",
    "shrink",
    "shrink_report",
    "sparsify",
    "strip",
    "tfmot",
]
