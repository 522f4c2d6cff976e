"""From the tensors of one projection to its :class:`QuantSpec`, or to an error that says what is wrong.

The tensors decide; the configuration is held against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftq.plugin.checkpoint.headers import TensorInfo
from graftq.quant_linear.errors import CheckpointError
from graftq.quant_linear.spec import SUPPORTED_BITS, QuantSpec

if TYPE_CHECKING:
    pass

SCALE_DTYPES = ("F16", "BF16", "F32")

Fail = Callable[[str], CheckpointError]


@dataclass(frozen=True)
class Declared:
    """What the configuration says of one projection; None where it says nothing.

    Attributes:
        bits: Code width.
        group_size: Rows per group, -1 for one group.
        desc_act: Whether act-order was used.
        sym: Whether zero points are symmetric.
        zero_offset: 1 for ``gptq`` (v1), 0 for ``gptq_v2``.
        disputed_order: What two files say of ``desc_act``, where they contradict each other; else "".
    """

    bits: int | None = None
    group_size: int | None = None
    desc_act: bool = False
    sym: bool | None = None
    zero_offset: int = 1
    disputed_order: str = ""


def spec_from_headers(
    module: str,
    tensors: Mapping[str, TensorInfo],
    declared: Declared,
    in_features: int | None = None,
    out_features: int | None = None,
    has_bias: bool = False,
) -> QuantSpec:
    """Describe a projection by its tensors' shapes and dtypes.

    Args:
        module: Its name in the checkpoint, for messages.
        tensors: Its tensors by suffix.
        declared: What the configuration says.
        in_features: K of the model's layer; None takes what the tensors show.
        out_features: N of the model's layer; None takes what the tensors show.
        has_bias: Whether the model's layer adds a bias.

    Returns:
        The spec; ``desc_act`` and ``sym`` as declared, until
        :func:`~graftq.plugin.checkpoint.values.check_values` has seen the values.

    Raises:
        CheckpointError: naming file, module and reason.
    """
    missing = [suffix for suffix in ("qweight", "qzeros", "scales") if suffix not in tensors]
    if missing:
        present = next(iter(tensors.values()))
        raise CheckpointError(f"{' and '.join(missing)} missing", file=present.file, module=module)
    _check_dtypes(module, tensors)
    rows, padded_out = tensors["qweight"].shape
    file = tensors["qweight"].file

    def fail(reason: str) -> CheckpointError:
        return CheckpointError(reason, file=file, module=module)

    n = padded_out if out_features is None else out_features
    g_idx = tensors.get("g_idx")
    k = in_features
    if k is None:
        k = g_idx.shape[0] if g_idx is not None else rows * 32 // (declared.bits or 4)
    if foreign := _foreign_packing(rows, padded_out, k, n, tensors["scales"].shape[1]):
        raise fail(f"qweight is packed as {foreign} packs it, not GPTQ")
    bits, padded = _fit_bits(rows, k, declared, fail)
    padded_in = g_idx.shape[0] if g_idx is not None and g_idx.shape[0] in padded else padded[0]
    if padded_out not in _paddings(n, declared.group_size):
        raise fail(f"qweight has {padded_out} columns, the layer {n} outputs")
    num_groups = tensors["scales"].shape[0]
    group_size = _fit_group_size(num_groups, k, padded_in, declared, fail)
    spec = QuantSpec(
        bits=bits,
        in_features=k,
        out_features=n,
        group_size=group_size,
        num_groups=num_groups,
        desc_act=declared.desc_act and num_groups > 1,
        sym=bool(declared.sym),
        zero_offset=declared.zero_offset,
        padded_in=padded_in,
        padded_out=padded_out,
        stored_g_idx=0 if g_idx is None else g_idx.shape[0],
        stored_bias=tensors["bias"].shape[0] if has_bias and "bias" in tensors else 0,
    )
    expected: dict[str, list[tuple[int, ...]]] = {
        "scales": [(num_groups, padded_out)],
        "qzeros": [(num_groups, spec.packed_zero_columns)],
        "g_idx": [(size,) for size in padded],
        "bias": [(n,), (padded_out,)],
    }
    for suffix, shapes in expected.items():
        info = tensors.get(suffix)
        if info is not None and info.shape not in shapes:
            raise CheckpointError(
                f"shape {list(info.shape)}, expected {list(shapes[0])} for {bits} bits, K={k}, N={n}",
                file=info.file,
                module=info.name,
            )
    if has_bias and "bias" not in tensors:
        raise fail("bias missing: the model's layer has one")
    return spec


def is_gptq(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether packed tensors are laid out as GPTQ's: one column of ``qweight`` for each of ``scales``."""
    info, scales = tensors.get("qweight"), tensors.get("scales")
    if (
        info is None
        or scales is None
        or "qzeros" not in tensors
        or info.dtype != "I32"
        or not len(info.shape) == len(scales.shape) == 2
    ):
        return False
    return info.shape[1] == scales.shape[1]


def _check_dtypes(module: str, tensors: Mapping[str, TensorInfo]) -> None:
    integers: dict[str, tuple[str, ...]] = {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32", "I64")}
    allowed = {**integers, "scales": SCALE_DTYPES, "bias": SCALE_DTYPES}
    for suffix, info in tensors.items():
        ranks = 1 if suffix in ("g_idx", "bias") else 2
        if info.dtype not in allowed[suffix]:
            wanted = " or ".join(allowed[suffix])
            raise CheckpointError(f"dtype {info.dtype}, expected {wanted}", file=info.file, module=info.name)
        if len(info.shape) != ranks or 0 in info.shape:
            raise CheckpointError(f"shape {list(info.shape)} is not GPTQ's", file=info.file, module=info.name)


def _foreign_packing(rows: int, columns: int, k: int, n: int, scale_columns: int) -> str | None:
    """Name the other formats that store an int32 ``qweight``, by their shapes for 4 and 8 bits.

    GPTQ's 2 bits, padded to twice the outputs, look like Marlin's 4 but for the scales, which are padded, too.
    """
    if rows == k and columns * 8 == n:
        return "AWQ"
    if rows * 16 == k and columns in (2 * n, 4 * n) and scale_columns != columns:
        return "Marlin"
    return None


def _paddings(size: int, group_size: int | None) -> set[int]:
    """Sizes a writer may have padded ``size`` to: multiples of the packing block and of the group."""
    steps = [32] + ([group_size] if group_size and group_size > 0 else [])
    return {size} | {math.ceil(size / step) * step for step in steps}


def _fit_bits(rows: int, k: int, declared: Declared, fail: Fail) -> tuple[int, list[int]]:
    """The code width, and the sizes (``k`` or padded) that fill ``rows`` rows of ``qweight`` with it."""
    fits = {
        bits: sizes
        for bits in SUPPORTED_BITS
        if (sizes := [k_ for k_ in sorted(_paddings(k, declared.group_size)) if math.ceil(k_ * bits / 32) == rows])
    }
    if declared.bits in fits:
        return declared.bits, fits[declared.bits]
    if declared.bits is None and fits:
        return next(iter(fits.items()))
    shown = f"the tensors show {' or '.join(map(str, fits))}" if fits else f"no width fits K={k}"
    raise fail(f"the configuration says {declared.bits} bits, but qweight has {rows} rows: {shown}")


def _fit_group_size(num_groups: int, k: int, padded_in: int, declared: Declared, fail: Fail) -> int:
    size = declared.group_size
    if size is None:
        if k % num_groups:
            raise fail(f"{num_groups} groups over K={k}, and the configuration names no group_size")
        return k // num_groups
    expected = {1} if size == -1 else {math.ceil(k / size), math.ceil(padded_in / size)}
    if num_groups not in expected:
        raise fail(
            f"the configuration says group_size {size}, so {min(expected)} groups over K={k}, "
            f"but scales has {num_groups} rows"
        )
    return k if size == -1 or num_groups == 1 else size
