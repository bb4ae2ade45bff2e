"""Peers beside ours: wrong answers are marked, and targets are judged."""

import sys

import numpy as np
import pytest

from experiments.bench import (
    measure,
    peers,
)


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

    monkeypatch.setattr(measure, "clouds", reversed_clouds)
    monkeypatch.setattr(peers, "marginal", planted)
    rows, _ = peers.peers(tmp_path, sizes=(4,), d=8, classes=(), repeats=1, kinds=("unrelated",))
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers == {"good": "right", "dear": "WRONG", "lazy": "WRONG"}
    assert (tmp_path / "peers.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_torch_its_rows_are_left_out_and_one_sentence_says_so(monkeypatch, tmp_path):
    pytest.importorskip("ot")  # first, for SciPy looks for torch when it is first imported
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    rows, notes = peers.peers(tmp_path, (16,), 4, (2,), 1, ("related",))
    assert notes == [peers.NO_TORCH] and "pip install" in notes[0]
    assert not any("torch" in row["what"] for row in rows)
    answers = {row["what"]: row.get("answer") for row in rows}
    assert answers["floor: two products"] is None
    assert answers["w2"] == answers["cw2"] == "right"
    # Their epsilon, 5% of the mean cost, puts them far above exact on these clouds.
    assert answers["ott-jax, defaults"] == answers["ott-jax, padded classes"] == "WRONG"
    assert all(row["iterations"] >= 0 for row in rows if row["what"] in ("w2", "cw2"))


def test_peers_say_whether_the_target_is_met():
    def note(torch, answer="right"):
        name = {"clouds": "clustered", "n": 512}
        rows = [name | {"what": "w2", "answer": answer, "ratio": 1.0}]
        for form, (ratio, its) in zip(("cdist", "product"), torch, strict=True):
            rows.append(name | {"what": f"torch + emd, {form}", "answer": its, "ratio": ratio})
        return peers._verdicts(rows)

    faster, cdist = note([(3.0, "right"), (2.0, "right")])
    assert faster.endswith("2.00, target at least 2.5: MISSED") and "faster form" in faster
    assert cdist.endswith("3.00, target at least 2.5: met") and "paper's cdist" in cdist
    assert note([(3.0, "right"), (2.0, "WRONG")])[0].endswith("met")
    assert note([(3.0, "right"), (2.0, "right")], "WRONG")[0].endswith("its answer is WRONG")


def test_torchs_answer_is_exact():
    pytest.importorskip("torch")
    x, y, labels = measure.clouds("clustered", 32, 6, classes=3)
    exact = peers.exact_w2(x, y)
    for cost in ("cdist", "product"):
        _, value, plan = peers.torch_emd([(x, y)], cost)
        assert peers.judge(exact, value, plan)["answer"] == "right"
    by_class = [peers.exact_w2(x[labels == c], y[labels == c]) for c in range(3)]
    _, value, _ = peers.torch_emd([(x[labels == c], y[labels == c]) for c in range(3)], "cdist")
    assert value == pytest.approx(np.mean(by_class), rel=1e-4)
