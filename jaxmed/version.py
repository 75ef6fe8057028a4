"""The version of the package, in one place that any room may read."""

__version__ = '0.7.0'
