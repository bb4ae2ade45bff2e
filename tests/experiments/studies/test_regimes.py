"""The study of regimes: which images are for what, what is never read, and the tables."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from experiments import regimes
from experiments.common.errors import UsageError
from experiments.data.load import load
from experiments.studies.regimes import (
    adapted,
    drawing,
    labelled,
    networks,
    page,
    splits,
    study,
    summary,
)
from experiments.studies.regimes.rows import ROWS, Row
from experiments.studies.regimes.run import rows_of
from experiments.studies.regimes.shifts import shift
from experiments.studies.regimes.store import Store
from experiments.studies.regimes.study import LABEL_FREE, LABELLED, SHIFTS, STUDIES, smoked
from kd2m_jax import models, outputs
from kd2m_jax.internal import terms

SIZES = {"digits": (1347, 450), "mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}
SIZES["cifar10-conv"] = SIZES["cifar10"]
STUDY = dataclasses.replace(smoked(STUDIES["digits"]), steps=3)


def labels_of(name, part=0):
    return np.random.default_rng(part).integers(0, 10, SIZES[name][part]).astype(np.int32)


def apart(*parts):
    together = np.concatenate(parts)
    return len(np.unique(together)) == len(together)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("regime", [*LABELLED, LABEL_FREE])
def test_no_image_is_for_two_purposes(name, regime):
    study, y = STUDIES[name], labels_of(name)
    pool, held = splits.held_out(study, len(y))
    assert apart(pool, held) and len(pool) + len(held) == len(y)
    for seed in range(3):
        split = splits.labelled(study, regime, y, seed)
        assert apart(split.train, split.validation)
        assert set(split.validation) <= set(held) and set(split.train) <= set(pool)
        assert set(split.transfer) <= set(pool)
        if regime != "noise":  # there the distance sees the images that have the wrong labels
            assert apart(split.train, split.transfer)
        if regime in study.labels:
            assert (len(split.train), len(split.validation)) == study.labels[regime]
        wrong = np.mean(split.labels != y)
        noisy = regime == "noise" and regime in study.labels
        assert wrong == (pytest.approx(0.4, abs=0.05) if noisy else 0)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("name", STUDIES)
def test_a_bank_shares_no_image_with_the_student(name, unequal):
    study, y, test_y = STUDIES[name], labels_of(name), labels_of(name, 1)
    parts = splits.shifted(study, y, test_y, 1, unequal=unequal)
    assert apart(parts.bank, parts.clean, parts.shifted, parts.validation)
    pool, held = splits.held_out(study, len(y))
    assert set(parts.validation) <= set(held)
    assert {*parts.bank, *parts.clean, *parts.shifted} <= set(pool)
    counts = np.bincount(test_y[parts.test], minlength=10)
    assert bool(counts.max() > 5 * counts.min()) is unequal


def test_seeds_draw_other_images_and_few_are_equally_many_of_each_class():
    y = labels_of("mnist")
    one, other = (splits.labelled(STUDIES["mnist"], "transfer", y, seed) for seed in (0, 1))
    assert set(one.train) != set(other.train) and set(one.validation) != set(other.validation)
    assert np.bincount(y[one.train]).tolist() == [10] * 10


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_keep_shape_type_and_range(name):
    x = np.zeros((5, 28, 28, 1), np.uint8)
    x[:, 10:20, 12:15] = 255
    found = shift(x, name)
    assert found.shape == x.shape and found.dtype == np.uint8 and found.max() <= 255
    assert not np.array_equal(found, x)
    if name == "translation":
        np.testing.assert_array_equal(found[:, 12:22, 14:17], 255)


@pytest.fixture(scope="module")
def world():
    """Digits and an untrained teacher, which is as good to see what is read."""
    dataset = load("digits")
    seen = networks.as_seen(dataset)
    x, test_x = seen(dataset.train[0]), seen(dataset.test[0])
    teacher = networks.network(dataset, STUDY)
    out = outputs(teacher, x)
    return networks.World(dataset, x, dataset.train[1], test_x, dataset.test[1], teacher, out, out)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cw2", "kd", "jw2"])
def test_labels_of_the_transfer_set_are_never_read(world, metric):
    split = splits.labelled(STUDY, "transfer", world.y, 0)

    def found(y):
        return labelled._fitted(world, STUDY, Row(metric), 0, split._replace(labels=y), (1.0,))[0]

    scrambled = world.y.copy()
    scrambled[split.transfer] = np.random.default_rng(0).permutation(scrambled[split.transfer])
    assert not np.array_equal(scrambled, world.y)
    one, other = (outputs(found(y), world.test_x).logits for y in (world.y, scrambled))
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_without_labels_no_label_is_read(world):
    scrambled = world._replace(y=np.roll(world.y, 1))
    one, other = (labelled.label_free(w, STUDY, Row("cw2"), 0) for w in (world, scrambled))
    assert one["tried"] == other["tried"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["w2", "gaussian-cw2, statistics, balanced"])
def test_labels_of_shifted_images_are_never_read(world, method):
    place = adapted.domain(world, STUDY, "rotation", 0)
    scrambled = world.y.copy()
    scrambled[place.parts.shifted] = (scrambled[place.parts.shifted] + 1) % 10
    one, other = (
        adapted.adapted(w, STUDY, place, adapted.METHODS[method], 0)["tried"]
        for w in (world, world._replace(y=scrambled))
    )
    assert one == other


def content(rows):
    about = {"dataset": "digits", "regime": "few", "teacher_accuracy": 99.0}
    return {
        "about": about,
        "environment": {"cpu": "none", "cores": 1},
        "dates": ["2026-11-26"],
        "rows": {
            row: {
                str(seed): {"tried": tried, "cpu_seconds": 1.0} for seed, tried in enumerate(seeds)
            }
            for row, seeds in rows.items()
        },
    }


def test_lambda_is_chosen_on_validation_images_and_never_on_test_images():
    tried = {"0.1": [50.0, 99.0], "1.0": [60.0, 10.0], "10.0": [60.0, 70.0], "auto:1": [99.0, 99.0]}
    assert summary.chosen({"tried": tried}) == "1.0"
    assert summary.chosen({"tried": {"0.1": None, "1.0": [1.0, 2.0]}}) == "1.0"
    assert summary.chosen({"tried": {"none": [50.0, 60.0]}}) == "none"
    # The smallest of equals, in whatever order they were tried.
    assert summary.chosen({"tried": {"0.01": [50.0, 1.0], "0.001": [50.0, 2.0]}}) == "0.001"


@pytest.mark.parametrize(
    ("validation", "further"),
    [
        ({0.01: 90, 1.0: 80, 100.0: 70}, (0.001,)),
        ({0.01: 90, 1.0: 90, 100.0: 90}, (0.001,)),  # the smallest of equals is at the end, too
        ({0.01: 70, 1.0: 80, 100.0: 90}, (1000.0,)),
        ({0.01: 70, 1.0: 90, 100.0: 80}, ()),
        ({0.01: 70, 1.0: 90, 100.0: 90}, ()),
        ({0.01: None, 1.0: 90, 100.0: 80}, ()),
        ({0.01: None, 1.0: None}, ()),
        ({0.0001: 90, 1.0: 80}, ()),  # no further
        ({1.0: 80, 10000.0: 90}, ()),
    ],
)
def test_the_grid_is_widened_where_the_best_lambda_is_at_its_end(validation, further):
    tried = {str(one): None if score is None else [score, 0.0] for one, score in validation.items()}
    assert labelled.beyond(tried | {"auto:1": [99.0, 99.0]}) == further


def test_tables_are_of_paired_differences_and_corrected():
    alone = [{"none": [0.0, a]} for a in (70.0, 71.0, 72.0)]
    kd = [{"0.1": [1.0, a], "1.0": [0.0, 0.0]} for a in (72.0, 74.0, 74.0)]
    both = [{"0.1": [1.0, a], "1.0": [0.0, 5.0]} for a in (73.0, 74.0, 76.0)]
    found = summary.summarised(content({"none": alone, "kd": kd, "kd+cw2": both}))
    difference = found["rows"]["kd"]["difference"]
    assert difference["mean"] == pytest.approx(7 / 3)
    p = stats.ttest_rel([72, 74, 74], [70, 71, 72]).pvalue
    assert difference["p"] == pytest.approx(p)
    assert difference["p_holm"] >= difference["p"]
    assert found["rows"]["kd"]["others"]["1.0"]["mean"] == pytest.approx(-71)
    assert found["rows"]["kd+cw2"]["against"]["kd"]["mean"] == pytest.approx(1)
    # Without lambda there is nothing at another one.
    longer = summary.summarised(content({"none": alone, "longer": alone, "kd": kd}))
    assert longer["rows"]["longer"]["others"] == {"1.0": None}
    text = summary.text(content({"none": alone, "kd": kd, "kd+cw2": both}))
    assert "+2.3" in text and "-71.0" in text and "auto" not in text


def test_of_one_lambda_each_none_was_chosen():
    alone = [{"none": [0.0, a]} for a in (70.0, 71.0, 72.0)]
    kd, l2 = ([{name: [1.0, a]} for a in (72.0, 74.0, 74.0)] for name in ("10.0", "1.0"))
    header, _, *lines = summary.rows_of_text(content({"none": alone, "kd": kd, "l2": l2}))
    assert header == ["", "λ", "accuracy (%)", "gain", "95% interval", "p (Holm)"]
    assert [line[:2] for line in lines] == [["kd", "10"], ["l2", "1"]]


def test_the_note_names_what_trained():
    found = content({"none": [{"none": [0.0, 70.0]}] * 2, "kd": [{"1.0": [1.0, 72.0]}] * 2})
    assert summary.note(found).endswith("0 CPU minutes on none, 1 cores; 2026-11-26.")
    found["also"] = [found["environment"] | {"accelerator": "H200"}, found["environment"]]
    both = "on none, 1 cores and none, 1 cores with one H200; 2026-11-26."
    assert summary.note(found).endswith(both)


def test_a_file_names_the_accelerator_that_trained(tmp_path, monkeypatch):
    assert "accelerator" not in Store(tmp_path / "a.json", {}, []).content["environment"]
    card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    store = Store(tmp_path / "b.json", {}, [])
    assert store.content["environment"]["accelerator"] == "NVIDIA H200"


@pytest.mark.parametrize("rows", [1, 31])
def test_the_detectable_difference_is_found_four_times_in_five(rows):
    gaps = np.random.default_rng(0).normal(size=(20_000, 5))
    alone = [{"none": [0.0, 0.0]}] * 5
    names = [f"row {i}" for i in range(rows)]
    some = {name: [{"1.0": [0.0, gap]} for gap in gaps[0]] for name in names}
    found = summary.summarised(content({"none": alone, **some}))["detectable"]["after Holm"]
    size = found / np.std(gaps[0], ddof=1)
    p = stats.ttest_1samp(gaps + size, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / rows) == pytest.approx(0.8, abs=0.015)


def test_files_in_docs_can_be_continued():
    folder = Path(__file__).parents[3] / "docs/results/regimes"
    files = sorted(folder.glob("*/*.json"))
    assert files
    for file in files:
        about = json.loads(file.read_text())["about"]
        name, teacher = file.parent.name, about["teacher_accuracy"]
        assert about == json.loads(json.dumps(study.about(name, file.stem, STUDIES[name], teacher)))


def test_a_size_at_its_default_is_not_part_of_what_a_file_is_about():
    with_default = dataclasses.replace(STUDIES["mnist"], coarse=1)
    other = dataclasses.replace(STUDIES["mnist"], coarse=2)
    about = [study.about("mnist", "few", one, 99.0) for one in (with_default, other)]
    assert "coarse" not in about[0]["study"] and about[1]["study"]["coarse"] == 2
    assert about[0] == study.about("mnist", "few", STUDIES["mnist"], 99.0)


def test_noise_differs_between_the_parts_of_a_domain():
    images = np.full((4, 8, 8, 1), 128, np.uint8)
    first, again, other = (shift(images, "noise", (0, part)) for part in (0, 0, 1))
    assert np.array_equal(first, again) and np.mean(first != other) > 0.5


def test_a_coarse_student_sees_squares_averaged():
    mlp = models.MLP((8,), 3, in_features=2 * 3 * 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 4, 6, 2)).astype(np.float32)
    rows = (x[:, ::2] + x[:, 1::2]) / 2
    squares = (rows[:, :, ::2] + rows[:, :, 1::2]) / 2
    found = networks.Coarse(mlp, 2)(x).logits
    np.testing.assert_allclose(found, mlp(squares).logits, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_there_are_kept_and_of_another_study_refused(tmp_path):
    path, order = tmp_path / "few.json", ["none", "kd"]
    store = Store(path, {"seeds": (1, 2)}, order)
    store.put("kd", 0, {"tried": {"1.0": [1.0, 2.0]}, "cpu_seconds": 0.1})
    store.put("none", 0, {"tried": {"none": [1.0, 2.0]}, "cpu_seconds": 0.1})
    again = Store(path, {"seeds": (1, 2)}, order)
    assert again.has("kd", 0) and not again.has("kd", 1)
    assert list(json.loads(path.read_text())["rows"]) == order
    with pytest.raises(UsageError, match="is of another study"):
        Store(path, {"seeds": (1, 3)}, order)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Store(path, {"seeds": (1, 2)}, order)


@pytest.mark.slow
def test_smoke_runs_and_again_trains_nothing(tmp_path, capsys):
    some = ("transfer", "shift")
    settings = regimes.Regimes(out=str(tmp_path), smoke=True, regimes=some)
    regimes.run(settings)
    assert capsys.readouterr().out.count("Numbers: ") == len(some)
    files = sorted((tmp_path / "digits").glob("*.json"))
    before = [file.read_bytes() for file in files]
    regimes.run(settings)
    assert [file.read_bytes() for file in files] == before


def test_a_regime_that_a_data_set_lacks_is_refused():
    settings = regimes.Regimes(dataset="cifar10-conv", regimes=("few",))
    with pytest.raises(UsageError, match="cifar10-conv has transfer, label-free, shift: not few"):
        regimes.run(settings)
    with pytest.raises(UsageError, match="--seeds must be at least 1, got 0"):
        regimes.run(regimes.Regimes(seeds=0))


def test_regimes_that_are_none_are_refused():
    with pytest.raises(UsageError, match="curve and pairs: not fewer"):
        regimes.run(regimes.Regimes(regimes=("fewer",)))


@pytest.mark.parametrize("row", [r for r, row in ROWS.items() if isinstance(row.metric, str)])
def test_rows_are_metrics_of_the_catalogue(row):
    assert terms(ROWS[row].metric)


def test_the_page_has_its_numbers_from_the_files(tmp_path):
    alone = [{"none": [0.0, a]} for a in (70.0, 71.0, 72.0)]
    kd = [{"0.1": [1.0, a], "1.0": [0.0, 60.0]} for a in (75.0, 76.5, 77.0)]
    (tmp_path / "mnist").mkdir()
    file = tmp_path / "mnist" / "few.json"
    file.write_text(json.dumps(content({"none": alone, "kd": kd, "kd+cw2": kd})))
    text = "{{mean mnist few none}}, {{gain mnist few kd}}; {{points mnist few kd}}, "
    text += "{{fixed mnist few kd 1.0}}; {{over mnist few kd+cw2}}; "
    text += "{{fixedgain mnist few kd 1.0}}\n{{table mnist few}}"
    found = page.filled(text, page.Numbers(tmp_path))
    assert found.startswith("71.0%, +5.2 [+4.4, +5.9], p = 0.002; +5.2, -11.0; +0.0 unknown over")
    assert "`kd`; -11.0 [-13.5, -8.5], p = 0.005\n" in found  # of two rows
    assert "| `kd` |" in found and "{{" not in found
    (tmp_path / "page.txt").write_text("{{note mnist few}}")
    drawing.write(tmp_path, tmp_path / "out.md")
    assert "3 seeds" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "mnist.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="has no row 'w2': none, kd, kd\\+cw2"):
        page.filled("{{mean mnist few w2}}", page.Numbers(tmp_path))
    with pytest.raises(UsageError, match=r"noise\.json is missing"):
        page.filled("{{mean mnist noise w2}}", page.Numbers(tmp_path))


def test_pairs_and_curves_on_the_page(tmp_path):
    (tmp_path / "mnist").mkdir()

    def put(name, rows):
        (tmp_path / "mnist" / f"{name}.json").write_text(json.dumps({"rows": rows}))

    one = {"right": [0.1, 0.31], "pairs": [[1, 9, 0], [8, 2, 0], [0, 1, 9]]}
    pairs = {"0": one, "1": one | {"right": [0.2, 0.5]}}
    put("pairs", dict.fromkeys(("w2", "gaussian-w2", "cw2"), pairs))
    accuracies = {
        "0.1": 70.0,
        "1.0": 90.5,
        "10.0": 91.0,
        "100.0": 90.0,
        "auto:0.1": 92,
        "auto:1": 60,
    }
    kd = {"0": {"tried": {name: [0.0, a] for name, a in accuracies.items()}}}
    put("curve-noise", {"none": {"0": {"tried": {"none": [0.0, 70.0]}}}, "kd": kd})
    text = "{{right mnist pairs w2}}; {{swaps mnist pairs w2}}; {{range mnist curve-noise kd}}"
    found = page.filled(text, page.Numbers(tmp_path))
    assert found == "15% before training, 40% after; 90% of 0 with 1, 80% of 1 with 0; 1 to 100"
    (tmp_path / "page.txt").write_text("")
    drawing.write(tmp_path, tmp_path / "out.md")
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"mnist-pairs.png", "mnist-lambda.png"}


def test_the_page_in_docs_is_what_its_numbers_make():
    docs = Path(__file__).parents[3] / "docs"
    text = (docs / "results/regimes/page.txt").read_text()
    made = page.filled(text, page.Numbers(docs / "results/regimes"))
    assert (docs / "when-does-it-help.md").read_text() == made, "python docs/results/regimes.py"


def test_without_labels_nothing_takes_logits_that_nobody_trains():
    rows = rows_of("label-free", STUDIES["mnist"])
    assert {"none", "cw2", "kd"} <= {*rows} < {*rows_of("few", STUDIES["mnist"])}
    assert [row for row in rows if row.startswith("jw2") or "validation" in row] == []
