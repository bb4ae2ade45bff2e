"""Examples without a label, labels that are distributions, and a set for the distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Outputs, fit, from_nnx, init_state, losses, make_train_step, models, pmap_step
from kd2m_jax.training._labels import balanced, check_rule, classes_for

N, D, K = 48, 6, 3
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)
SOME = np.where(np.arange(N) % 3 == 0, Y, -1)


def mlp(seed=0, width=8):
    return models.MLP((width, 5), K, in_features=D, rngs=nnx.Rngs(seed))


def run(data, student=None, **options):
    options = {"epochs": 2, "batch_size": 16, "optimizer": optax.sgd(0.1)} | options
    return fit(mlp(1) if student is None else student, data, **options)


def same(one, other):
    for a, b in zip(*(jax.tree.leaves(nnx.state(r.student)) for r in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Which class a row without a label gets ----------------------------------------------------


def test_the_rules():
    rng = np.random.default_rng(0)
    student, teacher = (
        Outputs(jnp.zeros((6, 2)), jnp.asarray(rng.normal(size=(6, K)), jnp.float32))
        for _ in range(2)
    )
    labels = jnp.array([0, -1, 2, -1, -1, 1])
    own, theirs = (np.asarray(out.logits).argmax(1) for out in (student, teacher))
    rules = {"teacher": theirs, "own": own, "drop": np.full(6, -1), None: theirs}
    for rule, expected in rules.items():
        got = classes_for(check_rule(rule), labels, student, teacher)
        np.testing.assert_array_equal(got, np.where(labels == -1, expected, labels))
    # Without the teacher's prediction the usual one is "balanced".
    even = classes_for("balanced", labels, student, teacher)
    np.testing.assert_array_equal(classes_for(None, labels, student, None), even)
    unsure = teacher._replace(logits=None)
    np.testing.assert_array_equal(classes_for(None, labels, student, unsure), even)
    with pytest.raises(ValueError, match="logits for the same images, and there"):
        classes_for("teacher", labels, student, unsure)


@pytest.mark.parametrize("shares", [None, [0.5, 0.3, 0.2]])
def test_balanced_rows_have_the_shares(shares):
    raw = np.random.default_rng(0).normal([2, 0, -2], size=(60, K))
    logits = jnp.asarray(raw, jnp.float32)
    where = np.arange(60) < 50
    target = np.full(K, 1 / K) if shares is None else np.asarray(shares)
    log_p = balanced(logits, where, None if shares is None else jnp.asarray(shares))
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(p[where].mean(0), target, rtol=1e-4)
    # The nearest such matrix: rows differ from the softmax by one factor per class.
    ratio = np.asarray(log_p - jax.nn.log_softmax(logits))
    ratio = ratio - ratio[:, :1]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), atol=1e-4)


def test_balanced_rows_do_not_see_the_others():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, K)), jnp.float32)
    where = np.arange(20) < 12
    other = logits.at[12:].set(100.0)
    np.testing.assert_allclose(
        balanced(logits, where, None)[:12], balanced(other, where, None)[:12], rtol=1e-5
    )
    assert np.isfinite(balanced(logits, np.zeros(20, bool), None)).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("teachers", "unlabelled must be one of 'teacher', 'drop', 'own', 'balanced'"),
        (0, "unlabelled must be one of"),
        (("balanced", [0.5, 0.0, 0.5]), "shares of 'balanced' must be numbers > 0"),
        (("balanced", [0.5, 0.5]), "'balanced' has 2 shares, and there are 3 classes"),
    ],
)
def test_a_wrong_rule_is_named(rule, message):
    with pytest.raises(ValueError, match=message):
        run((X, SOME), teacher=mlp(0), metric="cw2", unlabelled=rule)


# --- In a step and in fit ----------------------------------------------------------------------


def one_step(labels, make=make_train_step, **options):
    student, teacher = from_nnx(mlp(1)), from_nnx(mlp(0))
    optimizer = optax.sgd(0.1)
    step = make(student, teacher, optimizer, metric="cw2", coef=0.5, **options)
    state = init_state(student, optimizer, X, key=jax.random.key(0))
    return step(state, teacher.init(None, X), (X, labels))


def test_a_step_takes_the_mean_over_the_rows_with_a_label():
    logits = np.asarray(mlp(1)(X).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    has = SOME >= 0
    _, metrics = one_step(SOME)
    np.testing.assert_allclose(metrics["task_loss"], -log_p[has, SOME[has]].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], (log_p.argmax(1) == SOME)[has].mean(), rtol=1e-6
    )
    seen = mlp(0)(X)
    filled = np.where(has, SOME, np.asarray(seen.logits).argmax(1))
    expected = losses.cw2(mlp(1)(X).features, seen.features, filled)
    np.testing.assert_allclose(metrics["distillation_loss"], expected, rtol=1e-5)
    _, dropped = one_step(SOME, unlabelled="drop")
    expected = losses.cw2(mlp(1)(X).features, seen.features, SOME)
    np.testing.assert_allclose(dropped["distillation_loss"], expected, rtol=1e-5)


def test_a_step_without_any_label():
    _, metrics = one_step(np.full(N, -1))
    assert metrics["task_loss"] == 0 and np.isnan(metrics["accuracy"])
    assert metrics["distillation_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["balanced", "own"])
def test_several_devices_step_as_one(rule):
    # Devices have unequal numbers of labels, and balancing is over the global batch.
    labels = np.where(np.arange(N) < 20, Y, -1)
    (one, metrics), (several, others) = (
        one_step(labels, make, unlabelled=rule) for make in (make_train_step, pmap_step)
    )
    for name in metrics:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(several.params), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [None, np.full(N, -1)])
def test_no_labels_at_all(labels, caplog):
    options = {"teacher": mlp(0), "metric": "cw2", "task_coef": 0, "coef": "auto", "epochs": 8}
    options |= {"optimizer": optax.adam(0.01)}
    result = run((X, labels), **options)
    assert "no example has a label" in caplog.text
    last = result.history[-1]
    assert "train_accuracy" not in last and last["task_loss"] == 0 and last["coef"] == 1
    assert last["distillation_loss"] < result.history[0]["distillation_loss"]
    same(result, run((X, labels), **options | {"coef": 1.0}))
    # As arrays, a dict or batches without labels.
    same(result, run({"image": X} if labels is None else {"x": X, "y": labels}, **options))
    batches = [(X[i : i + 16], None) for i in range(0, N, 16)]
    assert "train_accuracy" not in run(batches, **options | {"coef": 1.0}).history[-1]


def test_auto_is_one_for_batches_without_labels(caplog):
    batches = [(X[i : i + 16], None) for i in range(0, N, 16)]
    last = run(batches, teacher=mlp(0), metric="l2", coef="auto").history[-1]
    assert last["coef"] == 1 and "no example has a label" in caplog.text


@pytest.mark.parametrize("data", [(X, None), [(X[:16], None)], [(X[:16], np.full(16, -1))]])
def test_there_must_be_something_to_learn_from(data):
    with pytest.raises(ValueError, match="nothing to learn from"):
        run(data)


def test_training_accuracy_is_that_of_the_rows_with_a_label():
    batches = [(X[:16], Y[:16]), (X[16:32], np.full(16, -1)), (X[32:], Y[32:])]
    some = run(batches, optimizer=optax.sgd(0.0), epochs=1).history[-1]
    known = run([batches[0], batches[2]], optimizer=optax.sgd(0.0), epochs=1).history[-1]
    assert some["train_accuracy"] == known["train_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 4}, "per_class needs a class number for every example"),
        ({"eval_data": (X, np.full(N, -1))}, "eval_data has no label"),
        ({"eval_data": (X, np.eye(K)[Y])}, "eval_data needs class numbers"),
    ],
)
def test_where_labels_are_needed(options, message):
    with pytest.raises(ValueError, match=message):
        run((X, SOME), **options)


@pytest.mark.slow
def test_evaluation_counts_the_rows_with_a_label():
    of_some = run((X, Y), eval_data=(X, SOME)).history[-1]
    of_them = run((X, Y), eval_data=(X[SOME >= 0], Y[SOME >= 0])).history[-1]
    assert of_some["test_accuracy"] == of_them["test_accuracy"]
    np.testing.assert_allclose(of_some["test_loss"], of_them["test_loss"], rtol=1e-5)


# --- Distributions -----------------------------------------------------------------------------


def test_one_hot_distributions_are_class_numbers():
    hard, soft = run((X, Y)), run((X, np.eye(K)[Y]))
    np.testing.assert_allclose(hard.history[-1]["loss"], soft.history[-1]["loss"], rtol=1e-5)
    assert hard.history[-1]["train_accuracy"] == soft.history[-1]["train_accuracy"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(K)[Y] * 2, "must be distributions: >= 0, with rows of sum 1"),
        (np.eye(4)[Y], "distributions over 4 classes, and the student has 3"),
        (np.eye(K, dtype=int)[Y], "one class number per example, no one-hot rows"),
    ],
)
def test_wrong_distributions_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        run((X, labels))


@pytest.mark.slow
def test_preprocess_may_mix_examples_and_labels():
    seen = []

    def mixup(x, labels, keys):
        soft = jax.nn.one_hot(labels, K)
        seen.append(keys is None)
        if keys is None:
            return x, soft
        share = jax.random.uniform(keys[0], minval=0.5)
        mix = lambda a: share * a + (1 - share) * a[::-1]  # noqa: E731
        return mix(x), mix(soft)

    options = {"metric": "w2", "coef": 0.01, "optimizer": optax.adam(0.02), "epochs": 20}
    result = run((X, Y), preprocess=mixup, eval_data=(X, Y), teacher=mlp(0), **options)
    assert result.history[-1]["test_accuracy"] > 0.9 and {True, False} == set(seen)
    assert result.history[-1]["task_loss"] < result.history[0]["task_loss"]


@pytest.mark.slow
def test_one_hot_coding_of_no_label_is_no_label():
    coded = lambda x, labels, keys: (x, jax.nn.one_hot(labels, K))  # noqa: E731
    options = {"batch_size": N, "max_steps": 1, "teacher": mlp(0), "metric": "cw2", "coef": 0.1}
    plain, mixed = (
        run((X, SOME), preprocess=function, **options).history[0] for function in (None, coded)
    )
    for name in ("task_loss", "train_accuracy", "distillation_loss"):
        np.testing.assert_allclose(plain[name], mixed[name], rtol=1e-5)


def test_a_preprocess_of_three_arguments():
    with pytest.raises(TypeError, match=r"must return \(x, labels\)"):
        run((X, Y), preprocess=lambda x, labels, keys: x)
    seen = run((X, Y), preprocess=lambda x, labels, keys=None: (x, labels))
    same(seen, run((X, Y)))


# --- A transfer set ----------------------------------------------------------------------------

TX = X[::-1].copy() + 0.1
SEEN = mlp(0)(TX)
TRANSFER = {"metric": "cw2", "coef": 0.5, "transfer_batch_size": 16}


@pytest.mark.parametrize("transfer", [TX, (TX, SEEN)], ids=["network", "outputs"])
def test_the_first_step_of_a_transfer_set(transfer):
    teacher = mlp(0) if transfer is TX else None
    few = (X[:8], Y[:8])
    result = run(
        few, transfer=transfer, teacher=teacher, batch_size=8, max_steps=1, log_every=1, **TRANSFER
    )
    got = result.history[0]
    student = mlp(1)
    expected = losses.distillation_loss(
        student(few[0]), student(few[0]), few[1], metric=None, coef=0
    )
    np.testing.assert_allclose(got["task_loss"], expected[0], rtol=1e-5)
    # The first 16 rows of its own shuffle, with the classes that the teacher predicts.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2**32 - 1), 0)
    rows = np.asarray(jax.random.permutation(key, N))[:16]
    out, seen = student(TX[rows]), mlp(0)(TX[rows])
    value = losses.cw2(out.features, seen.features, np.asarray(seen.logits).argmax(1))
    np.testing.assert_allclose(got["distillation_loss"], value, rtol=1e-5)


def test_stored_outputs_are_the_networks():
    few = (X[:8], Y[:8])
    one, other = (
        run(few, transfer=transfer, teacher=teacher, batch_size=8, epochs=5, **TRANSFER)
        for transfer, teacher in ((TX, mlp(0)), ((TX, SEEN), None))
    )
    np.testing.assert_allclose(one.history[-1]["loss"], other.history[-1]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_every_row_of_the_transfer_set_is_seen_once_before_any_is_again():
    seen = []

    def network(params, state, x, *, train, rng):
        if train:
            jax.debug.callback(lambda x: seen.extend(np.asarray(x)[:, 0].tolist()), x)
        features = x @ params
        return Outputs(features, features), state

    from kd2m_jax import Network

    student = Network(lambda key, x: (jnp.eye(1, K), {}), network)
    labelled = (-np.arange(1.0, 9)[:, None].astype(np.float32), Y[:8])
    outputs = Outputs(np.ones((32, K), np.float32))
    run(
        labelled,
        student,
        transfer=(np.arange(32, dtype=np.float32)[:, None], outputs),
        batch_size=8,
        transfer_batch_size=16,
        metric="w2",
        epochs=4,
        devices=jax.devices()[:1],
        optimizer=optax.sgd(0.0),
    )
    jax.effects_barrier()
    rows = [x for x in seen if x >= 0]
    assert len(rows) == 64 and sorted(rows[:32]) == sorted(rows[32:]) == list(range(32))
    assert rows[:32] != rows[32:]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_transfer_set(tmp_path):
    options = {"transfer": TX, "teacher": mlp(0), "batch_size": 8, "epochs": 4, **TRANSFER}
    options |= {"optimizer": optax.adam(1e-2), "log_every": 1}
    few = (X[:16], SOME[:16])
    whole = run(few, **options)

    class Killed(BaseException):
        pass

    def kill(record):
        if record["step"] == 5 and not record.get("replayed"):
            raise Killed

    with pytest.raises(Killed):
        run(few, checkpoint_dir=tmp_path, save_every=0, callbacks=[kill], **options)
    same(whole, run(few, checkpoint_dir=tmp_path, **options))
    for changed in ({"transfer": TX + 1}, {"transfer_batch_size": 24}, {"unlabelled": "own"}):
        with pytest.raises(ValueError, match="made with other settings"):
            run(few, checkpoint_dir=tmp_path, **options | changed)


@pytest.mark.slow
def test_four_devices_mix_both_alike():
    few = (X[:8], Y[:8])
    options = {"transfer": TX, "teacher": mlp(0), "batch_size": 8, "epochs": 3, **TRANSFER}
    four = run(few, **options)
    one = run(few, devices=jax.devices()[:1], **options)
    np.testing.assert_allclose(four.history[-1]["loss"], one.history[-1]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_batches_with_labels_and_a_transfer_set(tmp_path):
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8)]
    result = run(batches, transfer=TX, teacher=mlp(0), **TRANSFER)
    assert result.history[-1]["step"] == 6 and np.isfinite(result.history[-1]["distillation_loss"])
    run(batches, transfer=TX, teacher=mlp(0), checkpoint_dir=tmp_path, **TRANSFER)
    with pytest.raises(ValueError, match="stored outputs and transfer set"):
        run(batches, transfer=TX + 1, teacher=mlp(0), checkpoint_dir=tmp_path, **TRANSFER)
    stored = [(*batch, mlp(0)(batch[0])) for batch in batches]
    with pytest.raises(ValueError, match="there are others or a transfer set"):
        run(stored, transfer=TX, teacher=mlp(0), **TRANSFER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer": TX}, "transfer needs a teacher, or its outputs"),
        ({"transfer": (TX, SEEN), "teacher": mlp(0)}, "there is another teacher"),
        ({"transfer": TX, "teacher": SEEN}, "there is another teacher"),
        ({"transfer": TX, "teacher": mlp(0), "transfer_batch_size": 64}, "larger than transfer"),
        ({"transfer": TX, "teacher": mlp(0), "transfer_batch_size": 0}, "must be at least 1"),
        ({"transfer": TX, "teacher": mlp(0), "transfer_batch_size": 18}, "not split evenly over 4"),
        ({"transfer": (TX[:40], SEEN), "teacher": None}, "must have a row for each"),
        ({"transfer": TX, "teacher": mlp(0), "metric": None}, "and metric is missing"),
        (
            {"transfer": TX, "teacher": mlp(0), "unlabelled": "drop"},
            "leaves the whole transfer set",
        ),
        ({"transfer": TX.astype(np.float16), "teacher": mlp(0)}, "must be as those of data"),
        ({"transfer": TX[:, :4], "teacher": mlp(0)}, "must be as those of data"),
        ({"transfer": (TX, Y), "teacher": mlp(0)}, r"transfer is x, or \(x, Outputs\)"),
        ({"transfer": (TX, None), "teacher": mlp(0)}, r"transfer is x, or \(x, Outputs\)"),
    ],
)
def test_mistakes_of_a_transfer_set_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run((X, Y), **{**TRANSFER, **options})
