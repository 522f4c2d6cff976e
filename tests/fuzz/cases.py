"""Mutations by kind, and the case that a seed, a kind and a number stand for."""

from __future__ import annotations

import importlib
import pkgutil
import random
from dataclasses import dataclass

from fuzz import mutations
from fuzz.bases import BASES, Base
from fuzz.checkpoint import Checkpoint
from fuzz.registry import KINDS, Mutation

for module in pkgutil.iter_modules(mutations.__path__):
    importlib.import_module(f"fuzz.mutations.{module.name}")


@dataclass(frozen=True)
class Case:
    """A mutation of a base, with the random numbers it is to use."""

    mutation: Mutation
    base: Base
    random: random.Random

    def build(self) -> Checkpoint:
        """The checkpoint."""
        checkpoint = self.base.checkpoint()
        self.mutation.function(checkpoint, self.random)
        return checkpoint


def case(seed: int, kind: str, number: int) -> Case:
    """The same for the same arguments, in every process; numbers take turns over the mutations of a kind."""
    own = KINDS[kind]
    mutation = own[number % len(own)]
    generator = random.Random(f"{seed}/{kind}/{number}")
    bases = [base for base in BASES if base.matches(**mutation.wanted)]
    return Case(mutation, generator.choice(bases), generator)
