"""transformers 4, which text-generation-inference pins: per-expert ``nn.Linear``, names as the checkpoint has them.

Covered: transformers 4.51 to 4.57. Called by :mod:`graftq.adapters.transformers` for what is older than 5.
"""
