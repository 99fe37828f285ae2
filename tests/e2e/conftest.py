"""The same places and commands as the tests of faults use."""

from tests.faults.conftest import memory, new_place, nursery, place

__all__ = ["memory", "new_place", "nursery", "place"]
