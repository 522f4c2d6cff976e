"""The ``cpu`` provider: layouts for the kernels that torch brings along, and products built of them."""
