"""The command line: ``graftq doctor`` and ``graftq inspect``."""
