"""A framework that knows nothing of graftq."""

__version__ = "0.1"
