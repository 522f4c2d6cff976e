"""What a model is calibrated with: texts of any form, as rows of token ids without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

CPU_TOKENS = 4096
"""Tokens that run through a block at once on a CPU, where rows are of one length."""

GPU_TOKENS = 16384
"""Likewise on any other device: each of many experts gets enough to keep a GPU busy."""


def token_rows(data: Any, tokenizer: Any = None, longest: int = 2048, limit: int | None = None) -> list[torch.Tensor]:
    """Rows of token ids.

    Args:
        data: Texts, lists of ids, tensors, mappings with ``input_ids`` (and ``attention_mask``), ``text`` or
            ``messages``, or one two-dimensional tensor.
        tokenizer: For texts; or where to load one, if there are any.
        longest: Longer rows are cut into several.
        limit: Tokens to take, all together.

    Returns:
        int64 [tokens] each; what an attention mask excludes is left out.

    Raises:
        ValueError: if something is of another form, or nothing is left.
    """
    if isinstance(data, (str, Mapping)):
        raise ValueError("calibration data: a list is needed, of texts or of token ids")
    rows: list[torch.Tensor] = []
    tokenizer = _Tokenizer(tokenizer)
    left = limit
    for position, entry in enumerate(data):
        row = _ids(entry, tokenizer, position)
        row = row if left is None else row[:left]
        rows += [piece for piece in row.split(longest) if len(piece)]
        if left is not None:
            left -= len(row)
            if left <= 0:
                break
    if not rows:
        raise ValueError("calibration data: no token in it")
    return rows


def batches(rows: Iterable[torch.Tensor], least: int = 1, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
    """Rows of equal length side by side, int64 [rows, tokens] on ``device``: there is never padding.

    Args:
        rows: From :func:`token_rows`.
        least: As many rows in a batch, where so many have one length.
        device: Where they will run.
    """
    most = CPU_TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length in sorted(by_length):
        same = by_length[length]
        step = max(least, most // length, 1)
        for first in range(0, len(same), step):
            yield torch.stack(same[first : first + step]).to(device)


def fingerprint(rows: Iterable[torch.Tensor]) -> str:
    """A SHA-256 of the token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
    return digest.hexdigest()


class _Tokenizer:
    """A tokenizer that is loaded when it is needed."""

    def __init__(self, given: Any):
        self.given = given

    @property
    def loaded(self) -> Any:
        if self.given is None:
            raise ValueError("calibration data: texts need a tokenizer")
        if isinstance(self.given, (str, Path)):
            self.given = AutoTokenizer.from_pretrained(self.given)
        return self.given

    def ids(self, text: str, **options: Any) -> Any:
        return self.loaded(text, verbose=False, **options)["input_ids"]


def _ids(entry: Any, tokenizer: _Tokenizer, position: int) -> torch.Tensor:
    if isinstance(entry, str):
        return _tensor(tokenizer.ids(entry), position)
    if isinstance(entry, Mapping) or hasattr(entry, "keys"):
        if "input_ids" in entry:
            ids = _tensor(entry["input_ids"], position)
            mask = entry.get("attention_mask")
            return ids if mask is None else ids[_tensor(mask, position) != 0]
        if "messages" in entry:
            text = tokenizer.loaded.apply_chat_template(entry["messages"], tokenize=False)
            return _tensor(tokenizer.ids(text, add_special_tokens=False), position)
        if "text" in entry:
            return _tensor(tokenizer.ids(entry["text"]), position)
        raise ValueError(f"calibration data: row {position} has neither input_ids nor text nor messages")
    return _tensor(entry, position)


def _tensor(ids: Any, position: int) -> torch.Tensor:
    try:
        row = torch.as_tensor(ids).cpu()
        if row.ndim == 2 and len(row) == 1:
            row = row[0]
        if row.ndim != 1 or (len(row) and row.is_floating_point()):
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"calibration data: row {position} is no text and no row of token ids") from None
    return row.to(torch.int64)
