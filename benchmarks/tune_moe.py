"""Try other tiles for the experts of one layer than ``experts_tiles`` chooses, one product after the other.

    python benchmarks/tune_moe.py --layer Qwen3-30B-A3B --tokens 2,4,8,16
    TRITON_INTERPRET=1 python benchmarks/tune_moe.py --check     # does it run at all; needs no GPU

Prints the time of the whole layer with the chosen tiles and with each that beats them, for a person to put into
``experts_tiles``; nothing is tuned at run time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from harness import COLD_BYTES, replayed
from moe import DEVICE, LAYERS, MAIN, TINY, Layer, Weights, bytes_per_expert, random_experts, random_routing

from graftq.quant_linear import experts_ops
from graftq.quant_linear.experts import QuantExperts
from graftq.quant_linear.tiles import Tile
from graftq.quant_linear.workspace import forget_graphs

Chosen = Callable[..., Tile]


def vector_tiles(atoms: int) -> Iterator[Tile]:
    for rows in (64, 128):
        for unroll in (1, 2, 4):
            for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                if atoms % unroll == 0 and splits * unroll <= atoms:
                    yield Tile(rows, 1, unroll, splits, stages=1)


def matrix_tiles(tokens: int, atoms: int) -> Iterator[Tile]:
    for rows, warps in ((64, 4), (128, 8), (128, 4)):
        for unroll in (1, 2):
            for splits in (1, 2, 3, 4, 8):
                if atoms % unroll or splits * unroll > atoms:
                    continue
                for stages in (2, 3, 4):
                    for registers in (None, 128) if tokens >= 64 else (None,):
                        yield Tile(rows, tokens, unroll, splits, warps, stages, registers, tokens * rows >= 16384)


def time_layer(layer: Layer, modules: list[QuantExperts], tokens: int) -> float:
    inputs = [
        (torch.randn(tokens, layer.hidden, device=DEVICE).half(), *random_routing(layer, tokens)) for _ in range(16)
    ]
    calls = 32 if tokens <= 64 else 4
    with torch.no_grad():
        us = replayed(lambda i: modules[i % len(modules)](*inputs[i % len(inputs)]), calls)
    forget_graphs()
    return us


def improve(
    name: str, atoms: int, tiles: list[Tile], run: Callable[[], float], limit: int | None
) -> tuple[Tile | None, float]:
    """Replace what the function ``name`` of ``experts_ops`` chooses for a product of ``atoms`` by each of ``tiles``.

    The best stays in force. Layers whose two products have equally many atoms are tuned in one.
    """
    chosen: Chosen = getattr(experts_ops, name)
    place = 3  # of ``atoms`` among the arguments of choose_vector and choose_matrix
    best, least = None, run()
    print(f"  {name}, {atoms} atoms, as chosen: {least:.1f} us", flush=True)
    for tile in tiles[:limit]:
        setattr(experts_ops, name, lambda *args, tile=tile: tile if args[place] == atoms else chosen(*args))
        try:
            us = run()
        except Exception as error:  # more shared memory or registers than there are
            print(f"  {tile}: {type(error).__name__}")
            continue
        if us < least:
            best, least = tile, us
            print(f"  {tile}: {us:.1f} us", flush=True)
    final = best
    setattr(
        experts_ops, name, chosen if final is None else lambda *args: final if args[place] == atoms else chosen(*args)
    )
    return best, least


def tune(layer: Layer, weights: Weights, tokens: int, limit: int | None) -> None:
    first = random_experts(layer, weights)
    others = max(1, int(COLD_BYTES // (bytes_per_expert(first) * layer.top_k)) // 2)
    modules = [first] + [random_experts(layer, weights) for _ in range(others if limit is None else 0)]
    original = {name: getattr(experts_ops, name) for name in ("choose_vector", "choose_matrix", "choose_tokens")}
    atoms = [layer.hidden // 128, layer.inner // 128]

    def run() -> float:
        return time_layer(layer, modules, tokens)

    usual = original["choose_tokens"](tokens * layer.top_k, layer.experts)
    blocks = [1] if tokens == 1 else [block for block in (16, 32, 64, 128) if usual // 2 <= block <= usual * 2]
    for block in blocks:
        print(f"{layer.name}, {weights}, {tokens} tokens, tiles of {block} slots", flush=True)
        if block > 1:
            experts_ops.choose_tokens = lambda *args, block=block: block  # type: ignore[assignment]
        for product_atoms in atoms:
            tiles = vector_tiles(product_atoms) if tokens == 1 else matrix_tiles(block, product_atoms)
            improve("choose_vector" if tokens == 1 else "choose_matrix", product_atoms, list(tiles), run, limit)
        for name, function in original.items():
            setattr(experts_ops, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default=LAYERS[0].name, choices=[layer.name for layer in LAYERS])
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="a tiny layer and two tiles of each kind")
    options = parser.parse_args()
    if options.check:
        for tokens in (1, 2):
            tune(TINY[0], MAIN, tokens, limit=2)
        return
    layer = next(layer for layer in LAYERS if layer.name == options.layer)
    for tokens in map(int, options.tokens.split(",")):
        tune(layer, replace(MAIN, bits=options.bits), tokens, limit=None)


if __name__ == "__main__":
    main()
