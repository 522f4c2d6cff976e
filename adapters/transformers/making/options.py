"""How to quantize a model: what callers of any door may choose, and what the checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftq.quant_linear.making.solve import Method

EFFORTS = ("autogptq", "normal", "high")


@dataclass(frozen=True)
class Options:
    """Everything but the model and the calibration data.

    Attributes:
        bits, group_size, sym: As in :class:`Method`.
        desc_act: Whether groups are made along the act-order, which costs time at inference.
        static_groups: Whether groups stay where they are although ``desc_act`` is set.
        act_group_aware: Without ``desc_act``: whether columns are rounded by falling curvature nevertheless.
        damp_percent: As ``damp`` in :class:`Method`.
        true_sequential: Whether the layers of a block see the quantized layers before them.
        effort: ``autogptq`` is the classical method, for comparison; ``high`` takes three times as long as ``normal``.
        lm_head: Whether the output embedding is quantized, too.
        blocks: The name of the list of blocks, if it is not to be found.
        modules: What to quantize in a block, as ``modules_in_block_to_quantize``; everything if None.
        batch_size: Rows that run at once, at least.
        meta: What the caller wants to be written beside graftq's own notes.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.1
    true_sequential: bool = True
    effort: str = "normal"
    lm_head: bool = False
    blocks: str | None = None
    modules: tuple[str, ...] | None = None
    batch_size: int = 1
    meta: Mapping[str, Any] | None = None
    method: Method = field(init=False)

    def __post_init__(self) -> None:
        """Derive the method.

        Raises:
            ValueError: naming the first value that cannot be.
        """
        if self.effort not in EFFORTS:
            raise ValueError(f"effort={self.effort!r}: one of {', '.join(EFFORTS)}")
        if self.desc_act and not self.static_groups:
            order = "grouped"
        elif self.desc_act or (self.act_group_aware and self.effort != "autogptq"):
            order = "static"
        else:
            order = "stored"
        classical: dict[str, Any] = {"search": False, "drift": 0.0, "refits": 0}
        more = classical if self.effort == "autogptq" else {"refits": 2, "passes": 2} if self.effort == "high" else {}
        method = Method(self.bits, self.group_size, self.sym, order, self.damp_percent, **more)
        object.__setattr__(self, "method", method)

    def parameters(self, desc_act: bool, skipped: list[str], tokens: int, digest: str) -> dict[str, Any]:
        """What ``quantize_config.json`` and ``config.json`` say.

        Args:
            desc_act: What the tensors show.
            skipped: Stored names of layers in blocks that are not quantized.
            tokens: Calibration tokens.
            digest: Their fingerprint. The texts themselves are nobody's business.
        """
        from importlib.metadata import version

        found: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp_percent,
            "desc_act": desc_act,
            "static_groups": self.method.order == "static",
            "sym": self.sym,
            "true_sequential": self.true_sequential,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "lm_head": self.lm_head,
            "meta": {
                **(self.meta or {}),
                "quantizer": [f"graftq:{version('graftq')}"],
                "effort": self.effort,
                "drift": self.method.drift,
                "tokens": tokens,
                "dataset_sha256": digest,
            },
        }
        if skipped:
            found["dynamic"] = {f"-:^{_escaped(name)}$": {} for name in skipped}
        return found


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
