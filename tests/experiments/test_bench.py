"""The measuring instrument: its tables, its files, its judgement of right and wrong answers."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments import bench as main
from experiments._common import bench, bench_growth, bench_losses, bench_peers, bench_step, cli


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.bench", *flags])
    cli.main(main.Bench(), main.run, module="experiments.bench", description="")


def test_rows_have_medians_between_quartiles_and_run_in_turn():
    calls = []
    cases = [bench.Case({"what": what}, lambda what=what: calls.append(what)) for what in "ab"]
    rows = bench.measure(cases, repeats=5)
    assert [row["what"] for row in rows] == ["a", "b"]
    assert all(row["q1"] <= row["ms"] <= row["q3"] for row in rows)
    assert calls == ["a", "b"] * 6  # the first round does not count
    assert bench.ratios(rows)[0]["ratio"] == 1


def test_a_table_aligns_and_shows_what_is_missing():
    table = bench.text_table([{"what": "w2", "ms": 1.23456}, {"what": "floor"}])
    assert table.splitlines() == ["what     ms", "-----------", "w2     1.23", "floor     -"]


def test_a_planted_wrong_peer_is_marked(monkeypatch, tmp_path):
    """One whose cost is 5% too high, and one whose plan is not a coupling."""

    def planted(x, y):
        plan = np.eye(len(x))[order := np.arange(len(x))[::-1]] / len(x)
        exact = ((x - y[order]) ** 2).sum(1).mean()
        lazy = plan * (np.arange(len(x)) > 0)[:, None]
        answers = {"good": (exact, plan), "dear": (1.05 * exact, plan), "lazy": (exact, lazy)}
        return [(name, int, *answer) for name, answer in answers.items()]

    def reversed_clouds(kind, n, d):
        x = np.arange(4.0 * d).reshape(4, d)
        return x, x[::-1] + 0.5, None

    monkeypatch.setattr(bench, "clouds", reversed_clouds)
    monkeypatch.setattr(bench_peers, "marginal", planted)
    rows, _ = bench_peers.peers(
        tmp_path, sizes=(4,), d=8, classes=(), repeats=1, kinds=("unrelated",)
    )
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers == {"good": "right", "dear": "WRONG", "lazy": "WRONG"}
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_without_torch_its_rows_are_left_out_and_one_sentence_says_so(monkeypatch, tmp_path):
    pytest.importorskip("ot")  # first, for SciPy looks for torch when it is first imported
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    rows, notes = bench_peers.peers(tmp_path, (16,), 4, (2,), 1, ("related",))
    assert notes == [bench_peers.NO_TORCH] and "pip install" in notes[0]
    assert not any("torch" in row["what"] for row in rows)
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers["floor: two products"] is None
    assert answers["w2"] == answers["cw2"] == "right"
    # Their epsilon, 5% of the mean cost, puts them 9% and 12% above exact on these clouds.
    assert answers["ott-jax, defaults"] == answers["ott-jax, padded classes"] == "WRONG"


def test_torchs_answer_is_exact():
    pytest.importorskip("torch")
    x, y, labels = bench.clouds("clustered", 32, 6, classes=3)
    exact = bench_peers.exact_w2(x, y)
    for cost in ("cdist", "product"):
        _, value, plan = bench_peers.torch_emd([(x, y)], cost)
        assert bench_peers.judge(plan, value, exact)["answer"] == "right"
    by_class = [bench_peers.exact_w2(x[labels == c], y[labels == c]) for c in range(3)]
    _, value, _ = bench_peers.torch_emd(
        [(x[labels == c], y[labels == c]) for c in range(3)], "cdist"
    )
    assert value == pytest.approx(np.mean(by_class), rel=1e-4)


@pytest.mark.parametrize(("n", "d"), [(16, 40), (64, 6)])
def test_the_eigh_peer_has_the_value_and_the_gradient(n, d):
    x, y, _ = bench.clouds("related", n, d)
    value, grad = jax.value_and_grad(bench_losses.eigh_gaussian_w2)(x, y)
    assert float(value) == pytest.approx(bench_losses.textbook_gaussian_w2(x, y), rel=1e-3)
    direction = np.random.default_rng(0).normal(size=x.shape)
    forms = [bench_losses.textbook_gaussian_w2(x + h * direction, y) for h in (1e-3, -1e-3)]
    assert float((grad * direction).sum()) == pytest.approx((forms[0] - forms[1]) / 2e-3, rel=2e-2)


def test_newton_schulz_reaches_the_polar_factor():
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(12, 12)))
    k = (u * np.geomspace(1, 1e-3, 12)) @ vt
    np.testing.assert_allclose(bench_losses.newton_schulz(k.astype(np.float32)), u @ vt, atol=1e-3)


def test_classes_and_gaussian_rows(tmp_path):
    rows, notes = bench_losses.classes(tmp_path, counts=(3,), n=12, d=4, repeats=1)
    assert len(rows) == 3 and len(notes) == 3
    assert min(row["ratio"] for row in rows) == 1
    rows, _ = bench_losses.gaussian(tmp_path, shapes=((16, 4),), polar_sizes=(8,), repeats=1)
    assert {"gaussian_w2", "n x n, SVD", "polar, SVD"} < {row["what"] for row in rows}


def test_growth_measures_a_point_in_a_process_of_its_own(monkeypatch, tmp_path):
    row = bench_growth._point("gaussian-w2 diagonal", 256, 8, repeats=1)
    assert (row["n"], row["d"]) == (256, 8) and row["ms"] > 0
    if sys.platform == "linux":
        assert 0 < row["peak MiB"] < 500

    def cubic(metric, n, d, repeats):
        return {"metric": metric, "n": n, "d": d, "ms": 1e-6 * n**3 * d, "peak MiB": n**2 / d}

    monkeypatch.setattr(bench_growth, "_point", cubic)
    rows, notes = bench_growth.growth(tmp_path, sizes=(64, 128), features=(4, 8, 16))
    assert len(rows) == 4 * (2 + 2)
    assert "w2: time ~ n^3.0, memory ~ n^2.0, time ~ d^1.0, memory ~ d^-1.0" in notes
    assert {path.name for path in tmp_path.iterdir()} == {"growth-n.png", "growth-d.png"}


def test_a_step_is_compared_with_one_that_runs_the_teacher_too(tmp_path):
    pairs = (("mlp-8-4", "mlp-6-4", (4, 4, 1)),)
    rows, notes = bench_step.step(tmp_path, pairs, metrics=("l2",), batch=8, repeats=1)
    assert [row["metric"] for row in rows] == ["none", "l2"] and rows[0]["ratio"] == 1
    assert "mlp-8-4 to mlp-6-4" in notes[0]


def test_the_main_prints_and_writes(monkeypatch, capsys, tmp_path):
    rows, notes = [{"metric": "w2", "ms": 1.0}], ["a note"]
    monkeypatch.setattr(bench_losses, "classes", lambda out, repeats: (rows, notes))
    command(monkeypatch, "--suite=classes", "--repeats=1", f"--out={tmp_path}")
    assert "metric" in (printed := capsys.readouterr().out) and "a note" in printed
    written = json.loads((tmp_path / "classes.json").read_text())
    assert (written["rows"], written["notes"]) == (rows, notes)
    assert written["versions"]["jax"] == jax.__version__
    assert {"date", "machine", "cores", "python"} <= written.keys()


def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys):
    for flags in (["--repeats=0"], ["--suite=peer"]):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *flags)
        assert stop.value.code == 2
        assert "Traceback" not in (error := capsys.readouterr().err) and error
