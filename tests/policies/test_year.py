"""Some weeks of a small fleet on a virtual clock: every moment is decided once, and nobody is forgotten."""

from __future__ import annotations

import pytest

from tests.bench.year import Year


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_weeks_of_a_fleet(seed: int) -> None:
    found = Year(machines=60, hypervisors=3, days=65, seed=seed).run()
    assert found.wrong == []
    assert found.late["no reason"] == 0
    assert found.counts["run"] > 3000
    assert found.counts["made up for by another"] > 0, "its controller was down"
    assert max(found.waits) < 1
