"""The version, readable without importing keras."""

__version__ = "0.1.0"
