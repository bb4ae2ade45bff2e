"""A trade-off's students, trained in one program, are those that are trained one by one."""

import json
import os
import signal
import sys

import pytest

from experiments import table, tradeoff
from experiments.analysis.finished import finished, outputs
from experiments.common import cli
from experiments.runs import train
from experiments.runs.folder import read_metrics
from experiments.studies import population

COEFS = ("0.01", "0.1", "auto:0.3")


def in_process(monkeypatch, module, default, out, *flags):
    tiny = ["--teacher=mlp-16-4", "--student=mlp-6-4", "--batch-size=64", "--seeds=1"]
    flags = [*tiny, "--epochs=2", f"--out={out}", *flags]
    monkeypatch.setattr(sys, "argv", ["main", *flags])
    cli.main(default, module.run, module="main", description="")


def together(monkeypatch, out):
    in_process(monkeypatch, tradeoff, tradeoff.Tradeoff(), out, "--metric=l2", "--coefs", *COEFS)


def cells(out):
    names = [f"l2={coef}".replace(":", "-") for coef in COEFS]
    return [out / "digits/seed0" / name for name in names]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run a trade-off in one go; return it and the calls of fit that it took."""
    out, fit, calls = tmp_path_factory.mktemp("together"), population.fit, []

    def counting(students, data, **options):
        calls.append(len(students))
        return fit(students, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "fit", counting)
        together(patch, out)
    return out, calls


@pytest.mark.slow
def test_the_students_end_as_they_do_one_by_one(whole, monkeypatch, tmp_path):
    out, calls = whole
    assert calls == [3]
    metrics = [f"l2={coef}" for coef in COEFS]
    in_process(monkeypatch, table, table.Table(), tmp_path, "--metrics", *metrics)
    for one, other in zip(cells(out), cells(tmp_path), strict=True):
        found, expected = read_metrics(one), read_metrics(other)
        assert len(found) == len(expected) > 10
        for line, reference in zip(found, expected, strict=True):
            assert line.pop("phase") == reference.pop("phase")
            assert line == pytest.approx(reference, rel=1e-4)
        assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
        configs = [json.loads((path / "config.json").read_text()) for path in (one, other)]
        assert configs[0] == configs[1]
        env = json.loads((one / "env.json").read_text())
        assert env["images_per_second"]["distilled"] > 0
        assert env["earlier"] == [{"students_in_one_program": 3}]
        assert "distilled student" in (one / "report.md").read_text()
        run = finished(one, None)
        images, labels = run.plan.dataset.test
        logits = outputs(run.trained["distilled"], run.plan.dataset, images).logits
        accuracy = found[-1]["test_accuracy"]
        assert float((logits.argmax(1) == labels).mean()) == pytest.approx(accuracy)
    assert not list(out.glob("digits/seed0/together-*"))


@pytest.mark.slow
def test_an_interrupted_population_goes_on(whole, monkeypatch, capsys, tmp_path):
    fit = population.fit

    def stopping(students, data, **options):
        def stop(record):
            if record["step"] > 25:
                os.kill(os.getpid(), signal.SIGTERM)

        return fit(students, data, **options | {"callbacks": [stop]})

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(population, "fit", stopping)
        together(patch, tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [p.name for p in cells(tmp_path)[0].glob("checkpoints/*")] == []

    # Killed between handing the first and the second student over: the group is still whole.
    resumed = []

    def watching(students, data, **options):
        options["callbacks"] = [*options["callbacks"], resumed.append]
        return fit(students, data, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(population, "fit", watching)
        patch.setattr(population, "_hand_over", killed_after_one(population._hand_over))
        together(patch, tmp_path)
    assert stop.value.code == 130
    assert any(record.get("replayed") for record in resumed)
    together(monkeypatch, tmp_path)
    for one, other in zip(cells(tmp_path), cells(whole[0]), strict=True):
        assert read_metrics(one) == read_metrics(other)


def killed_after_one(hand_over):
    done = []

    def hand(*args):
        if done:
            raise KeyboardInterrupt
        done.append(hand_over(*args))

    return hand


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_to_themselves(monkeypatch, tmp_path):
    flags = ["--metric=l2", "--max-steps=3", "--coefs", "1", "1e38"]
    in_process(monkeypatch, tradeoff, tradeoff.Tradeoff(), tmp_path, *flags)
    coefs = json.loads((tmp_path / "tradeoff-digits-l2.json").read_text())["coefs"]
    assert coefs["1e+38"]["accuracy"]["mean"] is None and list(coefs["1e+38"]["diverged"]) == ["0"]
    assert coefs["1"]["difference"]["mean"] is not None and not coefs["1"]["diverged"]
    assert "left out" in (tmp_path / "tradeoff-digits-l2.md").read_text()
    # Nothing is tried again.
    for module in (train, population):
        monkeypatch.setattr(module, "fit", None)
    in_process(monkeypatch, tradeoff, tradeoff.Tradeoff(), tmp_path, *flags)
