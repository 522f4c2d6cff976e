"""Public calibration texts by the names that older programs use."""

from __future__ import annotations

from typing import Any

SOURCES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "wikitext2": (("wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
    "c4": (
        ("allenai/c4",),
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", "streaming": True},
    ),
}
SOURCES["c4-new"] = SOURCES["c4"]

TEXTS = 512
"""Texts that are taken of one."""


def named_texts(name: str) -> list[str]:
    """Texts of a public data set.

    Raises:
        ValueError: for a name that is not known, or without the package ``datasets``.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset={name!r}: a list of texts, or one of {', '.join(SOURCES)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"dataset={name!r} needs the package `datasets`; without it, pass a list of texts of your own"
        ) from None
    arguments, options = SOURCES[name]
    texts: list[str] = []
    for row in load_dataset(*arguments, **options):
        if len(row["text"]) > 200:
            texts.append(row["text"])
        if len(texts) == TEXTS:
            break
    return texts
