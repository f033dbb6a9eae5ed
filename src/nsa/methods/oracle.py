"""The oracle of evaluation: a sparse method whose blocks are chosen by what it cannot know, their exact attention."""

from collections.abc import Iterator
from contextlib import contextmanager

_by_mass = False  # no context variable, which torch.compile cannot look into


@contextmanager
def selection_by_mass() -> Iterator[None]:
    """Inside, whole forwards of NSA and InfLLM-V2 choose the blocks of the largest exact mass, by PyTorch operations.

    It reads every key to choose. What a model then gains is what its choice of blocks costs it; what it still lacks of
    dense attention is what reading by blocks costs. Steps over static and paged caches are untouched.
    """
    global _by_mass
    before, _by_mass = _by_mass, True
    try:
        yield
    finally:
        _by_mass = before


def is_by_mass() -> bool:
    """Whether it is so now."""
    return _by_mass
