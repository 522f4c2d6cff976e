"""graftq: GPTQ checkpoints load right and run fast in the frameworks people already use.

Nothing has to be imported: entry points do the work. The packages are ``graftq.plugin`` (discovery and checkpoints),
``graftq.quant_linear`` (the numeric core) and ``graftq.adapters`` (one for each framework).
"""


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up only when asked for: reading metadata takes longer than this import
        from importlib.metadata import version

        return version("graftq")
    raise AttributeError(f"module 'graftq' has no attribute {name!r}")
