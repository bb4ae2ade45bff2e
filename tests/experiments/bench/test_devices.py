"""The global batch over several devices."""

import pytest

from experiments.bench import (
    devices,
)


@pytest.mark.slow
def test_devices_say_what_is_exchanged_and_what_the_metric_takes(monkeypatch, tmp_path):
    rows, _ = devices.devices(tmp_path, counts=(2,), sizes=(16,), repeats=1)
    [row] = rows
    assert (row["devices"], row["n"]) == (2, 16) and row["share"] < 1
    # Both networks' 128 features; for the cross-entropy the student's 10 logits, and labels; the
    # teacher's 10 logits, for examples without a label: `fit` knows whether there are any.
    assert row["gathered bytes"] == 4 * 16 * (2 * 128 + 10 + 1 + 10)
    planted = [{"devices": 2, "n": n, "share": n / 1000} for n in (128, 512, 1024)]
    assert devices._note(2, planted).endswith("more than half of the step from n = 512 on")
    assert devices._note(2, planted[:1]).endswith("at no n up to 128")
