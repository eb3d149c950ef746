"""Export Keras models to ``.tflite`` files with sparse weights, and check ``.tflite`` files."""

from keras_dst.export.findings import Finding, LintReport
from keras_dst.export.linter import lint
from keras_dst.export.report import ExportError, ExportReport, FileReport
from keras_dst.export.tflite import export_tflite

__all__ = [
    "ExportError",
    "ExportReport",
    "FileReport",
    "Finding",
    "LintReport",
    "export_tflite",
    "lint",
]
