"""The package's version, importable by anything at no cost."""

__version__ = "0.1.0"
