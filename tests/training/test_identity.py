"""What a resumed run compares with its checkpoint: values, whatever their spelling."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kd2m_jax import CheckpointError, Outputs, fit, losses, models
from kd2m_jax.training._identity import Compared, check_same


def out(features=5):
    shape = jax.ShapeDtypeStruct
    return Outputs(shape((8, features), jnp.float32), shape((8, 3), jnp.float32))


def described(metric="jw2", **changes):
    usual = {
        "metrics": [metric],
        "coefs": [0.1],
        "task_coef": 1.0,
        "teacher": {"w": np.ones(3, np.float32)},
        "data": (np.zeros((8, 4)), np.arange(8)),
        "optimizer": None,
        "params": {"w": jnp.ones((4, 3))},
        "outputs": lambda: (out(), out()),
        "others": {"seed": 0},
    }
    return Compared(**usual | changes).described()


def cosine(steps):
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))


def squared(s, t, labels, *, key=None):
    return jnp.mean((s.features - t.features) ** 2)


def halved(s, t, labels, *, key=None):
    return 0.5 * jnp.mean((s.features - t.features) ** 2)


jw2 = losses.get_metric
SAME = [
    ({"metric": jw2("jw2", beta=0.5)}, {"metric": "jw2:beta=.5"}),
    ({"metric": jw2("jw2", beta=1)}, {"metric": "JW2"}),  # the default
    ({"metric": "gaussian_w2"}, {"metric": "gaussian-w2"}),
    ({"metric": "kd+cw2"}, {"metric": losses.metric_sum([jw2("kd"), jw2("cw2")])}),
    ({"coefs": ["auto"]}, {"coefs": ["auto:0.1"]}),
    ({"coefs": [1]}, {"coefs": [1.0]}),
    ({"optimizer": cosine(10)}, {"optimizer": cosine(10)}),
    ({"coefs": [optax.linear_schedule(0, 1, 5)]}, {"coefs": [optax.linear_schedule(0, 1, 5)]}),
    ({"metric": squared}, {"metric": squared}),
    ({"teacher": {"w": jnp.ones(3)}}, {}),
]
OTHER = [
    ({"metric": "jw2:beta=0.5"}, {"metric": "jw2:beta=50.0"}, "jw2 beta 0.5 -> 50.0"),
    ({"metric": "jw2"}, {"metric": "w2"}, r"metric \['jw2'\] -> \['w2'\]"),
    ({"metric": "w2"}, {"metric": "w2@logits"}, "w2@logits"),
    ({"metric": "kd+cw2"}, {"metric": jw2("kd+cw2", weights=[1, 2])}, "weights"),
    ({"metric": "kd+cw2"}, {"metric": "kd:temperature=2+cw2"}, "term 1, kd temperature"),
    (
        {"metric": jw2("cw2", epsilon=0.01), "metrics": ["l2", "cw2"]},
        {"metrics": ["l2", "cw2:epsilon=0.2"]},
        "student 2: cw2 epsilon",
    ),
    ({"metric": squared}, {"metric": halved}, r"\['squared'\] -> \['halved'\]"),
    ({"coefs": [0.1]}, {"coefs": ["auto"]}, r"coef \[0.1\] -> \['auto:0.1'\]"),
    ({"coefs": [optax.linear_schedule(0, 1, 5)]}, {"coefs": [optax.linear_schedule(0, 1, 6)]},
     r"coef \(jax .*\)"),
    ({"task_coef": 1.0}, {"task_coef": 0.5}, "task_coef 1.0 -> 0.5"),
    ({"teacher": {"w": np.ones(3, np.float32)}}, {"teacher": {"w": np.zeros(3, np.float32)}},
     "teacher"),
    ({}, {"data": (np.ones((8, 4)), np.arange(8))}, "data"),
    ({"optimizer": optax.sgd(0.1)}, {"optimizer": optax.sgd(0.2)}, r"optimizer \(jax"),
    ({"optimizer": cosine(10)}, {"optimizer": cosine(20)}, r"optimizer \(jax"),
    ({"optimizer": None}, {"optimizer": cosine(10)}, "optimizer default -> given"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_one_run(one, other):
    assert described(**one) == described(**other)
    check_same(described(**one), described(**other), "here")


@pytest.mark.parametrize(("one", "other", "message"), OTHER)
def test_another_run(one, other, message):
    with pytest.raises(CheckpointError, match=f"made with other settings .*{message}"):
        check_same(described(**one), described(**other), "here")


def test_a_record_of_older_code_is_compared_by_what_it_has():
    new = described("jw2:beta=0.5:label_cost=kl:solver=sinkhorn", coefs=["auto"])
    old = {"seed": 0, "metric": ["jw2:beta=0.5:label-cost=kl"], "coef": ["auto"]}
    check_same(old, new, "here")
    check_same({}, new, "here")
    with pytest.raises(CheckpointError, match="seed 1 -> 0"):
        check_same(old | {"seed": 1}, new, "here")


def test_of_old_code_it_is_known_which_solver_it_took():
    old = {"seed": 0, "metric": ["cw2"], "coef": ["auto"]}
    with pytest.raises(CheckpointError, match="cw2 solver sinkhorn -> auto"):
        check_same(old, described("cw2", coefs=["auto"]), "here")
    check_same(old, described("cw2:solver=sinkhorn", coefs=["auto"]), "here")
    both = old | {"metric": ["w2:solver=exact+cw2"]}
    with pytest.raises(CheckpointError, match=r"\(term 2, cw2 solver sinkhorn -> auto\)"):
        check_same(both, described("w2:solver=exact+cw2", coefs=["auto"]), "here")
    said = old | {"metric": ["cw2:solver=auto"]}
    check_same(said, described("cw2:solver=auto", coefs=["auto"]), "here")


def mlp(seed):
    return models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(seed))


def run(folder, **options):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(32, 4)).astype(np.float32), np.arange(32) % 3
    usual = {"teacher": mlp(1), "metric": "jw2", "batch_size": 16, "epochs": 1}
    return fit(mlp(0), data, checkpoint_dir=folder, **usual | options)


def test_fit_compares_them(tmp_path):
    run(tmp_path, metric="jw2:beta=0.5", epochs=1)
    for change, message in (
        ({"metric": "jw2:beta=2"}, "jw2 beta 0.5 -> 2"),
        ({"metric": "jw2:beta=0.5", "teacher": mlp(2)}, "teacher"),
        ({"metric": "jw2:beta=0.5", "optimizer": optax.sgd(0.1)}, "optimizer"),
        ({"metric": "jw2:beta=0.5", "task_coef": 2}, "task_coef 1.0 -> 2.0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, **change)


def test_a_finished_run_goes_on_for_more_epochs_and_says_what_that_means(tmp_path, caplog):
    run(tmp_path)
    assert run(tmp_path, epochs=3).history[-1]["step"] == 6
    (record,) = (r for r in caplog.records if "planned" in r.message)
    assert "for 2 steps and is continued to 6" in record.message


def test_an_iterable_does_not_continue_what_arrays_began(tmp_path):
    run(tmp_path)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(16, 4)).astype(np.float32), np.arange(16) % 3)] * 2
    with pytest.raises(CheckpointError, match=r"data .* -> an iterable"):
        fit(mlp(0), batches, teacher=mlp(1), metric="jw2", checkpoint_dir=tmp_path)


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_a_folder_elsewhere_is_refused_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    with pytest.raises(CheckpointError, match=f"{os.fspath(folder)} is no local folder"):
        run(folder, callbacks=[seen.append])
    assert not seen and not list(tmp_path.iterdir())
