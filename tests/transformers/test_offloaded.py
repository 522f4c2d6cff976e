"""``weight`` of an offloaded packed layer, outside of its call: the values, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from support.loading import load

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}


def dispatched(checkpoint: Path, folder: Path, **options: Any) -> Any:
    model = load(checkpoint, dtype=torch.float16)
    return dispatch_model(model, ON_DISK, main_device="cpu", offload_dir=folder, offload_buffers=True, **options)


PLACED: dict[str, Callable[[Path, Path], Any]] = {
    "on the disk": lambda checkpoint, folder: load(
        checkpoint, dtype=torch.float16, device_map=ON_DISK, offload_folder=folder
    ),
    "lent from the CPU": lambda checkpoint, folder: cpu_offload(
        load(checkpoint, dtype=torch.float16), offload_buffers=True
    ),
    "on the disk in a kernel's layout": dispatched,
}


@pytest.mark.parametrize("placed", PLACED)
def test_weight_is_brought_in(placed: str, originals: dict[str, Path], tmp_path: Path) -> None:
    layer = PLACED[placed](originals["llama"], tmp_path).model.layers[1].mlp.down_proj
    assert all(tensor.is_meta for tensor in layer.packed().values())
    weight = layer.weight
    assert weight.dtype == torch.float16
    assert weight.equal(load(originals["llama"], dtype=torch.float16).model.layers[1].mlp.down_proj.weight)
    x = torch.randn(3, layer.in_features).half()
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), layer(x), rtol=0.01, atol=0.01)


def test_a_layer_that_its_block_brings_in_is_named(originals: dict[str, Path], tmp_path: Path) -> None:
    model = dispatched(originals["llama"], tmp_path, preload_module_classes=["LlamaMLP"])
    with pytest.raises(RuntimeError, match=r"of QuantLinear\(96, 64, .*\) is on the meta device: it is offloaded"):
        _ = model.model.layers[1].mlp.down_proj.weight


def test_a_call_without_the_hook_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model = PLACED["on the disk"](originals["llama"], tmp_path)
    layer = remove_hook_from_module(model.model.layers[1].mlp.down_proj)
    with pytest.raises(RuntimeError, match=r"packed weights of .*are on the meta device, and no hook has brought"):
        layer(torch.randn(3, layer.in_features).half())
