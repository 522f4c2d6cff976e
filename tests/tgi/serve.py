"""Starts the server as ``text-generation-server serve`` does, small enough for a test: a cache of 64 MB, float32.

float32, because tokens are to be compared: the server would compute in bfloat16 on its "ipex" system.
"""

import sys

import torch
from text_generation_server.utils import import_utils

import_utils.get_free_memory = import_utils.get_cpu_free_memory = lambda device, fraction: 64 << 20

import text_generation_server.models as models  # noqa: E402 - the line above must come before it
from text_generation_server.cli import app  # noqa: E402

if models.FLASH_ATTENTION:
    original = models.FlashCausalLM.__init__

    def in_float32(self, *args, **kwargs):
        """The real one, in float32."""
        original(self, *args, **{**kwargs, "dtype": torch.float32, "kv_cache_dtype": torch.float32})

    models.FlashCausalLM.__init__ = in_float32

if __name__ == "__main__":
    sys.argv[0] = "text-generation-server"
    app()
