"""Early stopping, averages of the weights, callbacks that end a run; accumulation and decay."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import linen as nn
from flax import nnx

from kd2m_jax import EarlyStopping, WeightAverage, ema_teacher, fit, from_nnx, models, restore
from kd2m_jax.training._averages import averaged

N, D, K = 48, 6, 3
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)


def mlp(seed=0):
    return models.MLP((8, 5), K, in_features=D, rngs=nnx.Rngs(seed))


def run(data=(X, Y), student=None, **options):
    options = {"epochs": 4, "batch_size": 16, "optimizer": optax.sgd(0.1), "log_every": 1} | options
    return fit(student or mlp(1), data, **options)


# --- "stop" ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("at", "last"), [(4, 5), (6, 6)])
def test_a_callback_ends_the_run_with_its_result(at, last, tmp_path):
    """In the middle of an epoch, whose record is read while the next step runs, and at its end."""

    def stop(record):
        return "stop" if record["step"] == at else None

    options = {"callbacks": [stop], "eval_data": (X, Y), "checkpoint_dir": tmp_path}
    found = run(**options)
    assert int(found.state.step) == last and found.history[-1]["step"] == last
    assert "test_accuracy" in found.history[-1]
    cut = run(max_steps=last)
    chex.assert_trees_all_equal(found.state.params, cut.state.params)
    # Taken up again it is still ended, without it it goes on to the same end as ever.
    again = run(**options)
    assert again.history == found.history
    chex.assert_trees_all_equal(again.student(X), found.student(X))
    on = run(**options | {"callbacks": []})
    chex.assert_trees_all_equal(on.state.params, run().state.params)


@pytest.mark.slow
def test_a_callback_that_stops_an_endless_stream():
    class Endless:
        def __iter__(self):
            while True:
                yield X[:16], Y[:16]

    found = run(Endless(), callbacks=[lambda r: "stop" if r["step"] == 5 else 0])
    assert int(found.state.step) == 6


# --- Early stopping ----------------------------------------------------------------------------


def stopped_after(scores, *given, name="test_accuracy", **options):
    """Return after how many evaluations it stops, of these scores."""
    stop = EarlyStopping(*given, **options)
    stop.begin("test_loss" if name == "test_loss" else "test_accuracy")  # as fit does
    for number, score in enumerate(scores, 1):
        assert stop({"loss": 1.0, "step": number}) is None  # a record without an evaluation
        if stop({"test_loss": 1.0, name: score}) == "stop":
            return number
    return None


def test_early_stopping_counts_evaluations_without_an_improvement():
    assert stopped_after([0.1, 0.2, 0.3, 0.4], 1) is None
    assert stopped_after([0.3, 0.3], 1) == 2
    assert stopped_after([0.3, 0.2, 0.31, 0.3, 0.3], 2) == 5
    assert stopped_after([3.0, 2.0, 2.5, 2.1], 2, name="test_loss") == 4
    assert stopped_after([3.0, 2.0, 2.5, 2.1], 2, name="test_loss", monitor="test_loss") == 4
    errors = {"name": "test_ece", "monitor": "test_ece"}
    assert stopped_after([0.3, 0.2, 0.25, 0.1, 0.1], 2, **errors) is None  # smaller is better
    assert stopped_after([0.3, 0.2, 0.25, 0.1, 0.1], 2, **errors, minimize=False) == 3
    with pytest.raises(ValueError, match="patience must be a whole number >= 1, got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="no score 'test_f1' to stop by: test_loss, test_accuracy"):
        EarlyStopping(1, monitor="test_f1")({"test_loss": 1.0, "test_accuracy": 1.0})


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_stays_ended(tmp_path):
    options = {"eval_data": (X, Y), "epochs": 50, "optimizer": optax.sgd(0.0)}
    found = run(callbacks=[EarlyStopping(3)], **options, checkpoint_dir=tmp_path)
    assert found.history[-1]["epoch"] == 4  # one that is the best, and three that are no better
    again = run(callbacks=[EarlyStopping(3)], **options, checkpoint_dir=tmp_path)
    assert again.history == found.history
    longer = run(callbacks=[EarlyStopping(5)], **options, checkpoint_dir=tmp_path)
    assert longer.history[-1]["epoch"] == 6


@pytest.mark.slow
def test_of_a_population_all_have_to_wait_for_the_last():
    rising = iter(np.linspace(0.1, 0.9, 40))

    def falls(out, labels):
        return next(rising)

    # One score for both students, which only the second one sees rise: odd and even calls.
    calls = []

    def alternating(out, labels):
        calls.append(len(calls))
        return 0.5 if len(calls) % 2 else falls(out, labels)

    stop = EarlyStopping(2, monitor="test_alternating")
    options = {"eval_data": (X, Y), "metrics": [alternating], "epochs": 6, "teacher": mlp(0)}
    both = run(**options, metric=["l2", "kd"], callbacks=[stop])
    assert [found.history[-1]["epoch"] for found in both] == [6, 6]


@pytest.mark.slow
def test_one_object_serves_many_runs(tmp_path):
    """Each call begins afresh: another run, and the same one taken up again."""
    stop = EarlyStopping(2)
    options = {"eval_data": (X, Y), "epochs": 8, "optimizer": optax.sgd(0.0)}
    assert [run(callbacks=stop, **options).history[-1]["epoch"] for _ in range(3)] == [3, 3, 3]

    def interrupt(record):
        if record["epoch"] == 3 and not record.get("replayed"):
            raise KeyboardInterrupt

    stop, options = EarlyStopping(4), options | {"checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[stop, interrupt], **options)
    assert run(callbacks=[stop], **options).history[-1]["epoch"] == 5


def test_a_population_waits_until_all_of_an_evaluation_is_in():
    stop = EarlyStopping(2)
    said = []
    for ours, theirs in zip([0.1, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.9], strict=True):
        for student, score in enumerate((ours, theirs)):
            record = {"test_loss": 1.0, "test_accuracy": score, "student": student}
            said.append(stop(record))
    assert said == [None] * 8
    for student in (0, 1):
        said.append(stop({"test_loss": 1.0, "test_accuracy": 0.0, "student": student}))
    assert said[8:] == [None, None]  # one evaluation since the jump
    for student in (0, 1):
        said.append(stop({"test_loss": 1.0, "test_accuracy": 0.0, "student": student}))
    assert said[10:] == [None, "stop"]


@pytest.mark.slow
def test_a_score_that_came_later_is_passed_over_in_old_records(tmp_path):
    run(checkpoint_dir=tmp_path, max_steps=4, eval_data=(X, Y))
    stop = EarlyStopping(3, monitor="test_ece")
    options = {"checkpoint_dir": tmp_path, "eval_data": (X, Y), "callbacks": [stop]}
    assert "test_ece" in run(**options, metrics=["ece"]).history[-1]


def test_stopping_without_anything_to_look_at_is_refused():
    with pytest.raises(ValueError, match="EarlyStopping looks at scores of eval_data"):
        run(callbacks=[EarlyStopping(1)])


# --- Averages ----------------------------------------------------------------------------------


def weights(decay, steps):
    """By the definition: decay^(t - s), brought to sum 1."""
    w = np.float64(decay) ** np.arange(steps - 1, -1, -1)
    return w / w.sum()


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_the_average_is_the_weighted_mean_of_all_steps(decay):
    values = np.random.default_rng(0).normal(size=(40, 5))
    average, kept = {"w": jnp.full(5, 1e9)}, jax.jit(WeightAverage(decay).kept)
    for step, value in enumerate(values):
        average = averaged(average, {"w": jnp.asarray(value)}, kept(jnp.int32(step)))
    expected = weights(decay, len(values)) @ values
    np.testing.assert_allclose(average["w"], expected, rtol=1e-3, atol=1e-5)
    late = float(kept(jnp.int32(10**6)))
    assert late == pytest.approx(decay, rel=1e-6)


def test_a_decay_that_is_none_is_refused():
    for decay in (0, 1, -0.1, "0.9", None):
        with pytest.raises(ValueError, match="decay must be between 0 and 1"):
            WeightAverage(decay)
    with pytest.raises(ValueError, match="one average of the student's weights can be kept"):
        run(callbacks=[WeightAverage(0.9), WeightAverage(0.9)])
    with pytest.raises(ValueError, match="one average of the student's weights can be kept"):
        run(teacher=ema_teacher(), metric="l2", callbacks=[WeightAverage(0.9)])


class Linen(nn.Module):
    """With batch statistics, which are averaged too."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        return nn.relu(x), nn.Dense(K)(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_what_is_evaluated_returned_and_restored_is_the_average(kind, tmp_path):
    def student():
        return mlp(1) if kind == "nnx" else Linen()

    def logits(found):
        return found(X).logits if kind == "nnx" else Linen().apply(found, X)[1]

    # The weights after every step, from runs that are cut there.
    options = {"epochs": 2, "optimizer": optax.sgd(0.3)}
    steps = [run(student=student(), **options, max_steps=k).state.variables for k in range(1, 7)]
    options |= {"callbacks": [WeightAverage(0.6)], "eval_data": (X, Y)}
    found = run(student=student(), **options, checkpoint_dir=tmp_path)
    w = weights(0.6, 6)
    expected = jax.tree.map(lambda *a: sum(x * y for x, y in zip(w, a, strict=True)), *steps)
    chex.assert_trees_all_close(found.state.average, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found.state.variables, steps[-1], rtol=1e-5, atol=1e-6)
    right = np.mean(np.asarray(logits(found.student)).argmax(1) == Y)
    assert found.history[-1]["test_accuracy"] == pytest.approx(right)
    last = np.mean(np.asarray(logits(restore(tmp_path, student()))).argmax(1) == Y)
    np.testing.assert_array_equal(logits(restore(tmp_path, student())), logits(found.student))
    np.testing.assert_array_equal(logits(restore(tmp_path, student(), "best")), logits(found.best))
    assert last == right
    plain = run(student=student(), epochs=2, optimizer=optax.sgd(0.3)).student
    assert np.abs(logits(plain) - logits(found.student)).max() > 1e-3


@pytest.mark.slow
def test_an_average_goes_on_to_the_bit(tmp_path):
    options = {"callbacks": [WeightAverage(0.9)], "epochs": 3, "eval_data": (X, Y)}
    whole = run(**options)
    run(**options, max_steps=4, checkpoint_dir=tmp_path)
    again = run(**options, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(whole.state.average, again.state.average)
    chex.assert_trees_all_equal(whole.student(X), again.student(X))
    with pytest.raises(Exception, match=r"weight_average 0.9 -> 0.5"):
        run(**options | {"callbacks": [WeightAverage(0.5)]}, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_the_average_of_half_precision_moves(tmp_path):
    half = mlp(1)
    nnx.update(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(half, nnx.Param)))
    options = {"epochs": 20, "callbacks": [WeightAverage(0.99)], "checkpoint_dir": tmp_path}
    found = run(student=half, **options)
    params, _ = found.state.average
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    own = jax.tree.leaves(nnx.state(found.student, nnx.Param))
    assert {a.dtype for a in own} == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_equal(restore(tmp_path, half)(X), found.student(X))
    start = jax.tree.leaves(nnx.state(half, nnx.Param))
    assert all((a != b).any() for a, b in zip(own, start, strict=True))


@pytest.mark.slow
def test_of_a_population_each_has_its_average():
    options = {"teacher": mlp(0), "coef": 0.1, "callbacks": [WeightAverage(0.8)]}
    both = run(metric=["kd", "l2"], **options)
    for metric, found in zip(["kd", "l2"], both, strict=True):
        alone = run(metric=metric, **options)
        chex.assert_trees_all_close(found.student(X), alone.student(X), rtol=1e-4, atol=1e-5)


# --- By optax ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_larger_batch():
    """Of the cross-entropy, whose mean over 48 is that over three batches of 16."""
    options = {"epochs": 3, "optimizer": optax.MultiSteps(optax.sgd(0.1), 3)}
    accumulated = run(**options, batch_size=16).state
    # An epoch is one update: the order within the batch does not matter.
    whole = run(epochs=3, optimizer=optax.sgd(0.1), batch_size=48).state
    chex.assert_trees_all_close(accumulated.params, whole.params, rtol=1e-4, atol=1e-6)
    assert int(accumulated.step) == 9


@pytest.mark.slow
def test_accumulation_goes_on_to_the_bit(tmp_path):
    options = {"epochs": 3, "optimizer": optax.MultiSteps(optax.sgd(0.1), 4)}
    run(**options, max_steps=5, checkpoint_dir=tmp_path)
    again = run(**options, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(again.state.params, run(**options).state.params)


@pytest.mark.slow
def test_masked_decay_leaves_biases_alone():
    """Without any gradient, weights shrink by 1 - rate * decay and biases stay."""

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    net = mlp(1)
    nnx.update(net, jax.tree.map(lambda p: p + 1, nnx.state(net, nnx.Param)))
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=matrices)
    found = run(student=net, optimizer=optimizer, task_coef=0, epochs=1, batch_size=48)
    for before, after in zip(
        jax.tree.leaves(from_nnx(net).init(None, X)[0]),
        jax.tree.leaves(found.state.params),
        strict=True,
    ):
        factor = 0.95 if before.ndim > 1 else 1
        np.testing.assert_allclose(after, before * factor, rtol=1e-5)
