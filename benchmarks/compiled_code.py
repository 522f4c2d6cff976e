"""What a compiled kernel says of itself: registers, spills, instructions, its longest loop, its widest load."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from triton import knobs


def read_amd(compiled: Any) -> dict[str, object]:
    """The facts of a kernel that Triton compiled for an AMD GPU, out of its assembly."""
    lines = [line.strip() for line in compiled.asm["amdgcn"].splitlines()]
    text = "\n".join(lines)
    code = [line for line in lines if re.match(r"(v|s|ds|global|buffer|flat|scratch)_\w+|\.LBB\w+:", line)]
    places = {line.partition(":")[0]: place for place, line in enumerate(code) if line.startswith(".LBB")}
    loop = 0
    for place, line in enumerate(code):
        jump = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if jump and places.get(jump[1], place) < place:
            loop = max(loop, place - places[jump[1]])
    widths = re.findall(r"(?:global|buffer)_load_(?:b|dwordx?)(\d*)", text)
    wide = [int(width or 1) for width in widths]
    bits = [width if width > 4 else 32 * width for width in wide]
    return {
        "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
        "spilled": int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0]),
        "instructions": len(code) - len(places),
        "loop": loop,
        "matrix": len(re.findall(r"^v_(?:mfma|wmma|swmmac)", text, re.MULTILINE)),
        "widest_load": max(bits, default=0) // 8,
    }


def read_nvidia(compiled: Any) -> dict[str, object]:
    """The same of one for an NVIDIA GPU, out of what the machine runs."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used, sass = (_dumped(what, file.name) for what in ("-res-usage", "-sass"))
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    loop = 0
    for place, text in code:
        jump = re.search(r"\bBRA(?:\.\w+)*\s+(?:\w+,\s*)?`?\(?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(place, 16):
            loop = max(loop, (int(place, 16) - int(jump[1], 16)) // 16 + 1)
    loads = re.findall(r"\bLDG[.\w]*", sass)
    return {
        "registers": int(re.findall(r"REG:(\d+)", used)[0]),
        "spilled": sum("STL" in text for _, text in code),
        "instructions": len(code),
        "loop": loop,
        "matrix": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "widest_load": max((128 if ".128" in load else 64 if ".64" in load else 32 for load in loads), default=0) // 8,
    }


def _dumped(what: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, what, path], capture_output=True, text=True, check=True).stdout
