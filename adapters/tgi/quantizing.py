"""``text-generation-server quantize``: by ``graftq quantize``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

logger = logging.getLogger("graftq")

ROWS, LENGTH = 128, 2048
"""Of WikiText-2, which is what the server calibrates with."""


def make_natively(original: Callable[..., None]) -> Callable[..., None]:
    """Quantize block by block with graftq; by the server's own code beside transformers before 5.16."""

    @functools.wraps(original)
    def quantize(
        model_id: str,
        bits: int,
        groupsize: int,
        output_dir: str,
        revision: str | None,
        trust_remote_code: bool,
        upload_to_model_id: str | None,
        percdamp: float,
        act_order: bool,
    ) -> None:
        found = version("transformers")
        if tuple(int(part) for part in found.split(".")[:2]) < (5, 16):
            logger.warning(
                "graftq quantizes with transformers 5.16 or newer, this is %s: the server's code runs", found
            )
            given: dict[str, Any] = {"upload_to_model_id": upload_to_model_id, "percdamp": percdamp}
            given |= {"trust_remote_code": trust_remote_code, "revision": revision, "output_dir": output_dir}
            return original(model_id=model_id, bits=bits, groupsize=groupsize, act_order=act_order, **given)
        if trust_remote_code:
            raise ValueError("trust_remote_code: graftq quantizes models whose code is in transformers")
        from graftq.plugin.cli.main import main

        call = ["quantize", model_id, output_dir, "--bits", str(bits), "--group-size", str(groupsize)]
        call += ["--damp-percent", str(percdamp), "--dataset", "wikitext2", "--seq-len", str(LENGTH)]
        call += ["--tokens", str(ROWS * LENGTH), "--resume"]
        call += ["--desc-act"] * act_order + (["--revision", revision] if revision else [])
        if status := main(call):
            raise SystemExit(status)  # what is wrong has been said
        if upload_to_model_id:
            from huggingface_hub import HfApi

            HfApi().upload_folder(folder_path=output_dir, repo_id=upload_to_model_id, repo_type="model")

    return quantize
