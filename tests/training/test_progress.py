"""The bar of fit(): when it is shown, and what it counts."""

import io
import sys
import types

import numpy as np
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import fit, models
from kd2m_jax.training import _progress


def test_a_bar_counts_what_was_replayed_as_done_but_not_as_speed(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: next(times))
    screen = io.StringIO()
    progress = _progress.Progress("fit", steps=25, batch_size=4, file=screen)
    bar = progress._bar
    progress({"step": 5, "loss": 1.0, "replayed": True})
    assert (bar.n, bar.initial, progress.per_second()) == (20, 20, None)
    progress({"step": 10, "loss": 1.0, "distillation_loss": 2.0, "test_accuracy": 0.5})
    # One record of its own is a moment, not a stretch of time.
    assert (bar.n, bar.initial, progress.per_second()) == (40, 20, None)
    progress({"step": 20, "loss": 1.0})
    assert bar.n == 80 and progress.per_second() == 20.0
    for part in ("loss=1.000", "distance=2", "test=50.0%"):
        assert part in bar.postfix
    progress.close()


def run(**options):
    x, _, labels = draw("clustered", 32, 10, classes=3, seed=0)
    net = models.MLP((8, 6), 3, in_features=10, rngs=nnx.Rngs(0))
    data = (x.astype(np.float32), labels.astype(np.int32))
    return fit(net, data, batch_size=16, epochs=2, log_every=1, eval_data=data, **options)


def test_fit_shows_a_bar_if_asked_or_in_a_terminal(capsys, monkeypatch):
    run()
    assert capsys.readouterr() == ("", "")  # pytest's capture is no terminal
    run(progress=True)
    errors = capsys.readouterr().err
    assert "fit: 100%" in errors and "64.0/64.0" in errors and "test=" in errors
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run()
    assert "fit: 100%" in capsys.readouterr().err
    run(progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("shell", "shows"), [("ZMQInteractiveShell", True), ("Terminal", False)])
def test_a_notebook_shows_it_too(shell, shows, monkeypatch):
    instance = type(shell, (), {})()
    fake = types.SimpleNamespace(get_ipython=lambda: instance)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert _progress.wanted(None) is shows
    assert _progress.wanted(False) is False
