"""Some three hundred damaged checkpoints: each loads right or is refused clearly, and so does ``inspect``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.gptq import Recipe
from support.models import relative_error

from fuzz.bases import RECIPES, Base
from fuzz.cases import KINDS
from fuzz.pool import Pool
from fuzz.report import problems
from fuzz.truth import plain_state, twin_logits
from fuzz.verdict import TOLERANCES

SEED = 0
FEWEST = 18
"""Cases of a kind; where it has more mutations, one of each."""


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """One worker where tests already run side by side, otherwise two."""
    made = Pool(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield made
    made.close()


@pytest.mark.parametrize("kind", sorted(KINDS), ids=lambda kind: kind.replace(" ", "-"))
def test_damaged_checkpoints_are_right_or_refused_clearly(kind: str, pool: Pool) -> None:
    keys = [(SEED, kind, number) for number in range(max(FEWEST, len(KINDS[kind])))]
    found = [line for key, said in pool.judge(keys) for line in problems(key, said)]
    assert not found, "\n".join([f"{len(found)} of {len(keys)}:", *found])


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_independent_reader_reads_what_was_written(architecture: str, recipe: Recipe) -> None:
    base = Base(architecture, recipe, "TheBloke's")
    checkpoint, twin = base.checkpoint(), base.twin()
    (tensors,) = checkpoint.shards.values()
    state = plain_state(checkpoint, tensors)
    assert state.keys() == twin.keys()
    for name, tensor in state.items():
        np.testing.assert_allclose(tensor.floats(), twin[name].floats(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_one_flipped_bit_is_more_than_the_tolerance(suffix: str) -> None:
    """What the verdict "right" is worth: the truth moves with every kind of tensor."""
    checkpoint = Base("llama", RECIPES[0], "TheBloke's").checkpoint()
    (tensors,) = checkpoint.shards.values()
    before = twin_logits(checkpoint, plain_state(checkpoint, tensors))
    checkpoint.change(
        f"{checkpoint.packed()[0]}.{suffix}", lambda array: array ^ 8 if suffix != "scales" else array * 1.01
    )
    after = twin_logits(checkpoint, plain_state(checkpoint, tensors))
    assert relative_error(after, before) > 10 * TOLERANCES[torch.float32]
