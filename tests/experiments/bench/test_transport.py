"""The suite of transport losses beside POT: what it calls right, and its peers."""

import numpy as np
import pytest

from experiments.bench import transport
from experiments.bench.clouds import clouds


@pytest.mark.slow
def test_rows_and_notes(tmp_path):
    """An answer that is off by more than its target is named."""
    options = {"sizes": (24,), "kinds": ("confused",), "traps": ("one-hot both",), "classes": (3,)}
    rows, notes = transport.losses(tmp_path, d=16, repeats=1, **options)
    assert [row["metric"] for row in rows] == ["w2", "jw2", "w2", "cw2"]
    assert not any("MISSED" in note for note in notes)
    for row in rows:
        assert row["value off"] <= 1e-5 and abs(row["pairing off"]) <= 1e-6 and row["ms"] > 0
        assert row["gradient off"] <= 1e-5
        assert (row["ties"] > 0.1) == (row["clouds"] == "one-hot both")
    assert rows[0]["POT's gradient off"] <= 1e-5
    for wrong in ({"gradient off": 0.1}, {"pairing off": 1e-4}, {"value off": 1e-3}):
        assert "MISSED" in transport.verdicts([{**rows[0], **wrong}])[-1]
    slow = {**rows[0], "n": 512, "times": 3.0}
    assert transport.verdicts([slow]) == [
        "w2, confused, 512: POT's time over ours: 3.00, target at least 4: MISSED"
    ]


def test_the_peer_without_torch_is_right():
    x, y, labels = clouds("confused", 24, 8, classes=3)
    parts = [np.flatnonzero(labels == c) for c in range(3)]
    value, gradients = transport.numpy_pot([x], [y], parts)()
    expected, right, _ = transport.exact([x], [y], parts)
    assert value == pytest.approx(expected, rel=1e-5)
    assert transport.relative(gradients, right) <= 1e-5
