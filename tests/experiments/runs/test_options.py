"""Flags of the training beyond the protocol: what they do, and that an old run knows none."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from children import environment
from mains import call

from experiments import cifar, digits, images, mnist
from experiments.common.errors import UsageError
from experiments.data.augment import preprocess
from experiments.data.load import load
from experiments.runs.build import build
from experiments.runs.configuration import RunConfig, configuration
from experiments.runs.protocols import PROTOCOLS
from experiments.runs.settings import check, from_config
from kd2m_jax import EarlyStopping, WeightAverage

SMALL = ["--teacher=mlp-32-16", "--student=mlp-8-16", "--metric=cw2", "--epochs=4"]


def given(**training):
    training = dataclasses.replace(digits.DEFAULTS.training, **training)
    return dataclasses.replace(digits.DEFAULTS, training=training)


@pytest.fixture(scope="module")
def data():
    return load("digits")


def updates(optimizer, steps=3):
    """Return what an optimizer makes of a fixed gradient."""
    params = {"w": jnp.array([1.0, -2.0])}
    state, found = optimizer.init(params), []
    for _ in range(steps):
        change, state = optimizer.update({"w": jnp.array([0.5, 0.1])}, state, params)
        params = optax.apply_updates(params, change)
        found.append(params["w"])
    return np.array(found)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, optax.sgd(optax.cosine_decay_schedule(0.1, 60), momentum=0.9)),
        ({"lr": 0.5}, optax.sgd(optax.cosine_decay_schedule(0.5, 60), momentum=0.9)),
        ({"optimizer": "adam"}, optax.adam(optax.cosine_decay_schedule(0.1, 60))),
        (
            {"optimizer": "adamw", "weight_decay": 0.2},
            optax.adamw(optax.cosine_decay_schedule(0.1, 60), weight_decay=0.2),
        ),
        (
            {"weight_decay": 0.3},
            optax.chain(
                optax.add_decayed_weights(0.3),
                optax.sgd(optax.cosine_decay_schedule(0.1, 60), momentum=0.9),
            ),
        ),
    ],
)
def test_the_optimizer_is_the_protocols_with_what_is_given(flags, expected):
    found = PROTOCOLS["digits"].optimizer(6, 10, **flags)
    np.testing.assert_array_equal(updates(found), updates(expected))


@pytest.mark.slow
def test_a_run_without_options_is_the_one_it_always_was(data):
    config = configuration(digits.DEFAULTS, data)
    assert config.options is None and "options" not in config.to_json()
    other = configuration(given(lr=0.2, ema=0.9), data)
    assert other.to_json()["options"] == {"lr": 0.2, "ema": 0.9}
    assert other.teacher_name != config.teacher_name
    assert RunConfig.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert build(digits.DEFAULTS, data).callbacks == []
    found = build(given(ema=0.9, early_stop=3), data).callbacks
    assert found[0] == WeightAverage(0.9)
    assert isinstance(found[1], EarlyStopping) and found[1].patience == 3


@pytest.mark.slow
def test_labels_are_smoothed_and_mixed(data):
    x, labels = (jnp.asarray(a[:32]) for a in data.train)
    keys = jax.random.split(jax.random.key(0), 32)
    smooth = preprocess(data, label_smoothing=0.2)
    inputs, soft = smooth(x, labels, keys)
    np.testing.assert_allclose(soft, 0.8 * np.eye(10)[labels] + 0.02, rtol=1e-5)
    np.testing.assert_array_equal(inputs, preprocess(data)(x, keys))
    again, same = smooth(x, labels, None)  # evaluation
    np.testing.assert_array_equal(same, labels)
    np.testing.assert_array_equal(again, preprocess(data)(x, None))
    mixed, soft = preprocess(data, mixup=0.4)(x, labels, keys)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    share = float(soft[0, labels[0]]) if labels[0] != labels[31] else None
    assert share is not None and 0 < share < 1
    np.testing.assert_allclose(
        mixed, share * inputs + (1 - share) * np.roll(inputs, 1, axis=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": -1.0}, "--lr must be above 0, got -1.0"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"weight_decay": float("nan")}, "--weight-decay must be at least 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing must be at least 0 and below 1, got 1.0"),
        ({"ema": 1.0}, "--ema must be at least 0 and below 1"),
        ({"mixup": -0.1}, "--mixup must be at least 0"),
        ({"early_stop": 0}, "--early-stop must be at least 1"),
    ],
)
def test_options_that_cannot_be(flags, message):
    with pytest.raises(UsageError, match=message):
        check(given(**flags))


def test_options_that_do_not_go_together():
    settings = dataclasses.replace(images.DEFAULTS, train="a", labels_per_class=3)
    training = dataclasses.replace(settings.training, mixup=0.2)
    with pytest.raises(UsageError, match="--mixup and --label-smoothing change labels"):
        check(dataclasses.replace(settings, training=training))
    with pytest.raises(UsageError, match="--data-dir has no meaning here"):
        run = dataclasses.replace(digits.DEFAULTS.run, data_dir="a")
        check(dataclasses.replace(digits.DEFAULTS, run=run))


def test_a_config_is_read_back(data):
    settings = given(lr=0.2, early_stop=2, seed=3)
    written = json.loads(json.dumps(configuration(settings, data).to_json()))
    assert from_config(digits.DEFAULTS, written).training == dataclasses.replace(
        settings.training, epochs=20, batch_size=128
    )
    again = configuration(from_config(digits.DEFAULTS, written), data)
    assert again.to_json() | {"parameters": {}} == written | {"parameters": {}}
    with pytest.raises(UsageError, match="of a run on other data"):
        from_config(images.DEFAULTS, written)
    assert from_config(mnist.DEFAULTS, written).networks.teacher == "resnet8"
    with pytest.raises(UsageError, match="of a run on other data"):
        from_config(cifar.DEFAULTS, written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": None}, "its metric cannot be None"),
        ({"protocol": "fast"}, "its protocol cannot be 'fast'"),
        ({"seed": "3"}, "its seed cannot be '3'"),
        ({"epochs": True}, "its epochs cannot be True"),
        ({"coef": 3}, "its coef cannot be 3"),
        ({"options": {"lr": "high"}}, "its lr cannot be 'high'"),
        ({"options": [1]}, r"it has \[1\] where it should have names and values"),
        ({"dataset": "images", "images": {}}, "of a run on other data"),
    ],
)
def test_a_config_that_no_run_wrote(change, message):
    with pytest.raises(UsageError, match=message):
        from_config(digits.DEFAULTS, {**CONFIG, **change})


def test_a_config_that_lacks_something():
    for key in CONFIG:
        with pytest.raises(UsageError, match=f"it lacks {key}"):
            from_config(digits.DEFAULTS, {k: v for k, v in CONFIG.items() if k != key})


# What every version of config.json has.
CONFIG = {
    "metric": "w2", "coef": [0.001], "task_coef": 1, "teacher": "mlp-8", "student": "mlp-8",
    "protocol": "digits", "epochs": 3, "batch_size": 64, "precision": "f32", "seed": 3,
}  # fmt: skip


def test_a_config_brings_its_solver(data):
    """Of an old file that is Sinkhorn, which it does not say; another metric has its own."""
    written = configuration(given(), data).to_json()
    assert written["solver"] == "auto"
    old = {key: value for key, value in written.items() if key != "solver"}
    for content in (written, old, written | {"solver": "ipot"}):
        settings = from_config(digits.DEFAULTS, json.loads(json.dumps(content)))
        assert configuration(settings, data).to_json() == content
    other = dataclasses.replace(settings.distillation, metric="w2")
    found = configuration(dataclasses.replace(settings, distillation=other), data)
    assert found.solver == "auto"


def shell(*flags, status=0, command="digits"):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", *flags],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_all_of_them_from_the_shell_and_again(tmp_path):
    options = ["--optimizer=adamw", "--lr=3e-3", "--weight-decay=1e-3", "--label-smoothing=0.1"]
    options += ["--mixup=0.2", "--ema=0.9", "--early-stop=2"]
    out = f"--out={tmp_path / 'run'}"
    assert "Report" in call(tmp_path, "digits", *SMALL, *options, out)
    assert "decided when to stop" in (tmp_path / "run" / "report.md").read_text()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    call(tmp_path, "digits", *SMALL, *options, out, "--resume")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    config = f"--config={tmp_path / 'run' / 'config.json'}"
    call(tmp_path, "digits", config, f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == before
    assert "with other settings" in call(tmp_path, "digits", *SMALL, out, "--resume", status=2)
    # What is kept is the average, whose accuracy the records have: another process finds it.
    shown = shell(f"--run={tmp_path / 'run'}", command="evaluate")
    lines = [json.loads(line) for line in before.splitlines()]
    last = [r["test_accuracy"] for r in lines if r.get("phase") == "distilled" and "test_loss" in r]
    assert f"{100 * last[-1]:.2f}%" in shown


@pytest.mark.slow
def test_a_flag_that_there_is_not_gets_the_nearest():
    assert "there is no flag --metrc: did you mean --metric?" in shell("--metrc=w2", status=2)
    assert "there is no flag --ealry-stop: did you mean --early-stop?" in shell(
        "--ealry-stop", "3", status=2
    )
    assert "kd2m_jax 0" in shell("--version")
    assert "cannot be used: No such file" in shell("--config=/nowhere/config.json", status=2)
