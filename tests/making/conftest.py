"""Models come in first: graftq takes over while they do, and forgets modules of its own that are half imported."""

import transformers.modeling_utils  # noqa: F401
