"""The ``triton`` provider: layouts in tiles, and the launches of the kernels next door."""
