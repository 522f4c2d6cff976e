"""``graftq quantize``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils  # noqa: F401 - graftq takes over first

from graftq.adapters.transformers.making.calibration import token_rows
from graftq.adapters.transformers.making.datasets import SOURCES, named_texts
from graftq.adapters.transformers.making.options import Options
from graftq.adapters.transformers.making.progress import Progress
from graftq.adapters.transformers.making.report import worst
from graftq.adapters.transformers.making.streaming import quantize_checkpoint


def run(arguments: Any) -> int:
    """Quantize as the command line says; 0 if all is well, 1 if not."""
    try:
        options = Options(
            bits=arguments.bits,
            group_size=arguments.group_size,
            sym=not arguments.asym,
            desc_act=arguments.desc_act,
            damp_percent=arguments.damp_percent,
            true_sequential=not arguments.no_true_sequential,
            effort=arguments.effort,
            lm_head=arguments.lm_head,
        )
        source = _folder(arguments.model, arguments.revision)
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        rows = token_rows(texts(arguments.dataset), str(source), arguments.seq_len, arguments.tokens)
        with Progress() as progress:
            report = quantize_checkpoint(
                source,
                Path(arguments.out),
                rows,
                options,
                dtype=dtype,
                device=device,
                resume=arguments.resume,
                step=progress.step,
            )
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"graftq: {error}", file=sys.stderr)
        return 1
    print(worst(report))
    return 0


def texts(dataset: str) -> Any:
    """The rows of a file (one text, or one JSON object a line), or a public data set.

    Raises:
        ValueError: if there is no such file, or a line is no JSON object.
    """
    path = Path(dataset)
    if not path.is_file():
        if dataset in SOURCES:
            return named_texts(dataset)
        raise ValueError(f"--dataset {dataset}: no such file, and none of {', '.join(SOURCES)}")
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [content]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    return found


def _folder(model: str, revision: str | None) -> Path:
    """The model's folder, downloaded if it is a repository of the Hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
