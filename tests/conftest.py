"""What every test starts from."""

from __future__ import annotations

import os

# Plain lines in captured logs, and no process that reaches for a Hub.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
