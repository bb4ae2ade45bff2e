"""A task of one's own in place of the cross-entropy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import (
    CheckpointError,
    Network,
    NonFiniteLoss,
    Outputs,
    fit,
    from_nnx,
    init_state,
    losses,
    make_train_step,
    models,
    pmap_step,
    shard_map_step,
)

N, D, K = 48, 6, 7
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)
TARGETS = np.stack([X[:, 0] ** 2, X[:, 1]], axis=1)
TAGS = np.stack([X[:, 0] > 0, X[:, 1] > X[:, 2], X[:, 3] > 1], axis=1).astype(np.float32)


def mlp(seed=0, outputs=2):
    return models.MLP((8, 5), outputs, in_features=D, rngs=nnx.Rngs(seed))


def squared(out, labels):
    return jnp.mean((out.logits - labels) ** 2, axis=1)


def run(data=(X, TARGETS), outputs=2, **options):
    options = {"epochs": 2, "batch_size": 16, "optimizer": optax.sgd(0.01)} | options
    return fit(mlp(1, outputs), data, **options)


@pytest.mark.slow
def test_the_first_step_of_a_regression_by_hand():
    """Mean squares of all targets plus lambda times l2, by jax.grad of the network itself."""
    student, teacher = mlp(1), mlp(0)
    options = {"teacher": teacher, "metric": "l2", "coef": 0.3, "batch_size": N, "epochs": 1}

    def loss(net):
        out = net(X)
        distance = jnp.mean(jnp.sum((out.features - teacher(X).features) ** 2, axis=1))
        return jnp.mean((out.logits - TARGETS) ** 2) + 0.3 * distance

    value, grads = nnx.value_and_grad(loss)(student)
    found = run(task_loss=squared, **options)
    assert found.history[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    before = jax.tree.leaves(nnx.state(mlp(1), nnx.Param))
    after = jax.tree.leaves(nnx.state(found.student, nnx.Param))
    for b, g, a in zip(before, jax.tree.leaves(grads), after, strict=True):
        np.testing.assert_allclose(a, b - 0.01 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_records_of_a_task_have_no_accuracy_and_the_best_has_the_lowest_loss():
    # A learning rate that is too large: the loss rises again.
    rates = optax.piecewise_constant_schedule(0.01, {6: 60.0})
    options = {"task_loss": squared, "eval_data": (X[:30], TARGETS[:30]), "epochs": 6}
    found = run(**options, optimizer=optax.sgd(rates))
    tests = [r["test_loss"] for r in found.history if "test_loss" in r]
    assert not any("accuracy" in name for record in found.history for name in record)
    assert np.argmin(tests) < len(tests) - 1
    for student, loss in ((found.best, min(tests)), (found.student, tests[-1])):
        got = np.mean((np.asarray(student(X[:30]).logits) - TARGETS[:30]) ** 2)
        assert got == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_a_scalar_is_the_mean_of_its_rows():
    def scalar(out, labels):
        return jnp.mean(squared(out, labels))

    options = {"eval_data": (X[:30], TARGETS[:30])}
    one, other = run(task_loss=scalar, **options), run(task_loss=squared, **options)
    chex.assert_trees_all_close(one.state.params, other.state.params, rtol=1e-5)
    assert one.history[-1]["test_loss"] == pytest.approx(other.history[-1]["test_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [pmap_step, shard_map_step])
def test_steps_take_a_task_and_devices_do_not_matter(make):
    student, teacher = from_nnx(mlp(1, 3)), from_nnx(mlp(0, 3))
    optimizer, variables = optax.sgd(0.1), teacher.init(None, X)

    def of_tags(out, labels):
        return optax.sigmoid_binary_cross_entropy(out.logits, labels).sum(axis=1)

    ended = []
    for step_of in (make_train_step, make):
        step = step_of(student, teacher, optimizer, metric="w2", coef=0.1, task_loss=of_tags)
        state = init_state(student, optimizer, X, key=jax.random.key(0))
        for _ in range(2):
            state, metrics = step(state, variables, (X, TAGS))
        assert "accuracy" not in metrics
        ended.append((state.params, metrics))
    chex.assert_trees_all_close(*ended, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_several_labels_at_once_are_learnt():
    def of_tags(out, labels):
        return optax.sigmoid_binary_cross_entropy(out.logits, labels).sum(axis=1)

    def exact_match(out, labels):
        return np.mean(((out.logits > 0) == labels).all(axis=1))

    options = {"task_loss": of_tags, "eval_data": (X, TAGS), "metrics": [exact_match]}
    found = run((X, TAGS), 3, **options, epochs=60, optimizer=optax.adam(1e-2))
    scores = [r["test_exact_match"] for r in found.history if "test_exact_match" in r]
    assert scores[-1] > 0.9 > scores[0]


@pytest.mark.slow
def test_classes_of_a_conditional_metric():
    """Numbers are classes; of other labels it takes what the teacher predicts."""
    teacher, seen = mlp(0, K), []

    def noting(student, teacher, labels):
        jax.debug.callback(lambda found: seen.append(np.sort(found)), labels)
        return losses.cw2(student.features, teacher.features, labels)

    options = {"teacher": teacher, "metric": noting, "coef": 0.1, "batch_size": N, "epochs": 1}

    def cross(out, labels):
        return optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, labels)

    def smooth(out, labels):
        return jnp.mean((out.logits - labels) ** 2)

    run((X, Y), K, task_loss=cross, **options)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[-1], np.sort(Y))
    run((X, np.eye(K)[Y]), K, task_loss=smooth, **options)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[-1], np.sort(teacher(X).logits.argmax(1)))


@pytest.mark.slow
def test_a_student_without_logits():
    """The task decides what it needs."""
    inner = from_nnx(mlp(1))

    def apply(params, state, x, *, train, rng):
        out, state = inner.apply(params, state, x, train=train, rng=rng)
        return Outputs(out.features), state

    def norm(out, labels):
        return (jnp.sum(out.features, axis=1) - labels) ** 2

    student = Network(inner.init, apply)
    found = fit(
        student, (X, X[:, 0]), task_loss=norm, epochs=1, eval_data=(X, X[:, 0]), batch_size=16
    )
    assert np.isfinite(found.history[-1]["test_loss"])
    with pytest.raises(TypeError, match="the student returns no logits"):
        fit(student, (X, Y), epochs=1, batch_size=16)


@pytest.mark.slow
def test_another_task_does_not_continue_a_run(tmp_path):
    def absolute(out, labels):
        return jnp.mean(jnp.abs(out.logits - labels))

    options = {"checkpoint_dir": tmp_path}
    first = run(task_loss=squared, **options)
    again = run(task_loss=squared, **options, epochs=3)
    assert again.history[: len(first.history)] == first.history
    with pytest.raises(CheckpointError, match="task_loss squared -> absolute"):
        run(task_loss=absolute, **options, epochs=4)


@pytest.mark.slow
def test_what_is_no_task_is_named():
    with pytest.raises(TypeError, match=r"task_loss must be a function \(Outputs, labels\), got 3"):
        run(task_loss=3)
    with pytest.raises(ValueError, match=r"task_loss must return a scalar or a value for each row"):
        run(task_loss=lambda out, labels: (out.logits - labels) ** 2)
    with pytest.raises(ValueError, match="data has 48 inputs, but 47 labels"):
        run((X, TARGETS[:47]), task_loss=squared)
    with pytest.raises(ValueError, match="data: labels must have a row for each example"):
        run((X, np.float32(3)), task_loss=squared)
    with pytest.raises(TypeError, match="data: labels must be numbers"):
        run((X, np.array(["a"] * N)), task_loss=squared)


@pytest.mark.slow
def test_labels_of_several_columns_count_as_rows():
    """The default learning rate ends at 0 after as many steps as there are."""
    options = {"epochs": 2, "batch_size": 16, "log_every": 1}
    for data, more in (
        ((X, TARGETS), {"task_loss": squared}),
        ((X, np.eye(2, dtype=np.float32)[Y % 2]), {}),
    ):
        last = fit(mlp(1), data, **options, **more).history[-1]
        assert last["step"] == last["steps"] == 6


@pytest.mark.slow
def test_one_target_per_row_against_logits_of_one_column():
    """[n, 1] - [n] is [n, n], whose mean over an axis is [n] again: it would learn the mean."""
    one = mlp(1, 1)
    with pytest.raises(ValueError, match=r"task_loss sets logits \[n, 1\] against labels \[n\]"):
        fit(one, (X, X[:, 0]), task_loss=squared, batch_size=16)
    good = [
        ((X, X[:, :1]), squared),
        ((X, X[:, 0]), lambda out, labels: (out.logits[:, 0] - labels) ** 2),
    ]
    ended = [
        fit(one, data, task_loss=task, batch_size=16, epochs=2, eval_data=data).history[-1]
        for data, task in good
    ]
    assert ended[0]["test_loss"] == pytest.approx(ended[1]["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_missing_labels_are_no_targets():
    for data in ({"image": X}, (X, None), [(X[:16], TARGETS[:16]), {"x": X[:16]}]):
        with pytest.raises(ValueError, match="has no labels, and task_loss takes some"):
            run(data, task_loss=squared)
    with pytest.raises(ValueError, match="eval_data has no labels, and task_loss takes some"):
        run(task_loss=squared, eval_data={"image": X})


@pytest.mark.slow
def test_labels_that_preprocess_changes_are_changed_in_evaluation_too():
    """The rate is 0: the training set's loss is the test set's."""

    def prepare(x, labels, keys):
        return x, (labels - 10) / 5

    options = {"epochs": 1, "batch_size": N, "optimizer": optax.sgd(0.0), "task_loss": squared}
    data = X, TARGETS * 5 + 10
    last = run(data, **options, preprocess=prepare, eval_data=data).history[-1]
    assert last["test_loss"] == pytest.approx(last["task_loss"], rel=1e-5)


@pytest.mark.slow
def test_the_best_epoch_of_a_task_goes_by_its_loss_whatever_the_scores():
    calls = []

    def accuracy(out, labels):
        calls.append(1)
        return -len(calls)

    options = {"task_loss": squared, "eval_data": (X, TARGETS), "metrics": [accuracy], "epochs": 4}
    found = run(**options)
    losses_of = [r["test_loss"] for r in found.history if "test_loss" in r]
    assert np.argmin(losses_of) == 3  # it falls
    chex.assert_trees_all_equal(found.best(X), found.student(X))


@pytest.mark.slow
def test_scores_and_labels_that_do_not_fit_are_named_before_training():
    options = {"task_loss": squared, "eval_data": (X, TARGETS)}
    for score in ("accuracy", "top-5", "ece"):
        with pytest.raises(ValueError, match=r"eval_data needs class numbers \[n\] as labels"):
            run(**options, metrics=[score])
    stored = {"features": mlp(0)(X).features}
    taught = {"teacher": Outputs(mlp(0)(X).features), "metric": "l2", "metrics": ["agreement"]}
    with pytest.raises(ValueError, match="agreement compares with the teacher's logits"):
        run((X, Y % 2), **taught, eval_data={"x": X, "y": Y % 2, "teacher": stored})

    def masked(out, labels):  # 0 / 0 for a row of its own without a target
        known = ~jnp.isnan(labels)
        return jnp.sum(jnp.where(known, out.logits - labels, 0) ** 2) / jnp.sum(known)

    missing = np.where(np.arange(N)[:, None] % 4 == 0, np.nan, TARGETS)
    with pytest.raises(NonFiniteLoss, match="task_loss of one example alone"):
        run((X, missing), task_loss=masked, eval_data=(X, missing))


@pytest.mark.slow
def test_the_accuracy_beside_a_task():
    def focal(out, labels):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=1)[:, 0]
        return -((1 - jnp.exp(log_p)) ** 2) * log_p

    found = run((X, Y), K, task_loss=focal, eval_data=(X, Y), metrics="accuracy")
    right = np.asarray(found.student(X).logits).argmax(1) == Y
    assert found.history[-1]["test_accuracy"] == pytest.approx(np.mean(right))
