"""What every test starts from."""

from __future__ import annotations

import os

# No test reaches for the Hub; those of tests/hub bring their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Matrices are tiny, and workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
