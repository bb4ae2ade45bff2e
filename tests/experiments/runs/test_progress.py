"""The progress bar."""

import io

from tqdm import tqdm

from experiments.runs import progress


def test_a_bar_counts_what_was_replayed_as_done_but_not_as_speed(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with tqdm(total=100, disable=False, file=io.StringIO()) as bar:
        shown = progress.Progress(bar, batch_size=4)
        shown({"step": 5, "loss": 1.0, "replayed": True})
        assert (bar.n, bar.initial, shown.images_per_second()) == (20, 20, None)
        shown({"step": 10, "loss": 1.0, "test_accuracy": 0.5})
        # One record of its own is a moment, not a stretch of time.
        assert (bar.n, bar.initial, shown.images_per_second()) == (40, 20, None)
        shown({"step": 20, "loss": 1.0})
        assert bar.n == 80 and shown.images_per_second() == 20.0
        assert "test=50.0%" in bar.postfix
