"""Keras model to a ``.tflite`` file with sparse weights, run and compared before it is written."""

from keras_dst.export.lint import Finding, LintReport, lint
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
