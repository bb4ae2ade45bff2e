"""fit(): what it trains, how it stops, and that a stopped run loses nothing."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Network, NonFiniteLoss, fit, from_nnx, losses, models, projected, training
from kd2m_jax.training._batches import Batches

N, D = 96, 10


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=8):
    return models.MLP((width, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


def run(**options):
    options = {"epochs": 4, "batch_size": 16, "eval_data": data(1), "seed": 5} | options
    return fit(mlp(1), data(), teacher=mlp(0, 32), metric="l2", coef=0.01, **options)


def host(tree):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tree)))


class Killed(BaseException):
    """What a kill is to the loop: the end, wherever it stands, without a last save."""


def kill_at(step):
    def callback(record):
        if record["step"] == step:
            raise Killed

    return callback


def test_history_and_results():
    teacher = mlp(0, 32)
    before = host(teacher)
    seen = []
    result = fit(
        mlp(1),
        data(),
        teacher=teacher,
        metric="cw2:solver=sinkhorn",
        coef=0.01,
        epochs=20,
        batch_size=16,
        eval_data=data(1),
        log_every=4,
        optimizer=optax.sgd(0.1),
        callbacks=[seen.append],
    )
    assert seen == result.history
    assert [(r["step"], r["epoch"]) for r in seen[:4]] == [(4, 1), (6, 1), (10, 2), (12, 2)]
    assert all(r["steps"] == 120 for r in seen)
    assert ["test_accuracy" in r for r in seen[:4]] == [False, True, False, True]
    for r in seen:
        total = r["task_loss"] + r["coef"] * r["distillation_loss"]
        np.testing.assert_allclose(r["loss"], total, rtol=1e-5)
    assert seen[-1]["task_loss"] < 0.5 * seen[0]["task_loss"]
    # The accuracy is that of the student that comes back, over all examples.
    x, labels = data(1)
    accuracy = (np.asarray(result.student(x).logits).argmax(1) == labels).mean()
    assert seen[-1]["test_accuracy"] == pytest.approx(accuracy)
    best = max(r.get("test_accuracy", 0) for r in seen)
    found = (np.asarray(result.best(x).logits).argmax(1) == labels).mean()
    assert found == pytest.approx(best)
    chex.assert_trees_all_equal(before, host(teacher))


def test_linen_student_and_nnx_teacher_in_one_program():
    class Student(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(6)(x)))
            return x, nn.Dense(3)(x)

    result = fit(
        Student(), data(), teacher=mlp(0), metric="gaussian-w2", coef=0.1, epochs=2, batch_size=32
    )
    assert set(result.student) == {"params", "batch_stats"}
    # ... and the other way round, with the variables that came back.
    again = fit(
        mlp(1),
        data(),
        teacher=Student(),
        teacher_variables=result.student,
        metric="l2",
        epochs=1,
        batch_size=32,
    )
    assert np.isfinite(again.history[-1]["distillation_loss"])


def test_an_iterable_of_batches_trains_like_the_arrays_it_holds():
    class OneBatch(list):
        """Anything that can be iterated once an epoch."""

    x, labels = data()
    options = {"epochs": 3, "optimizer": optax.sgd(0.1), "metric": "cw2", "teacher": mlp(0)}
    listed = fit(mlp(1), OneBatch([(x, labels)]), **options)
    arrays = fit(mlp(1), (x, labels), batch_size=N, **options)
    assert listed.history[-1]["step"] == arrays.history[-1]["step"] == 3
    # One batch of everything: the order of the rows within it does not matter.
    np.testing.assert_allclose(listed.history[-1]["loss"], arrays.history[-1]["loss"], rtol=1e-4)
    with pytest.raises(ValueError, match="a generator, which can be read only once"):
        fit(mlp(1), (batch for batch in [(x, labels)]), epochs=1)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    options = {"checkpoint_dir": tmp_path / "cut", "log_every": 3, "save_every": 0}
    whole = run(checkpoint_dir=tmp_path / "whole", log_every=3)
    for step in (3, 15):
        with pytest.raises(Killed):
            run(callbacks=[kill_at(step)], **options)
    records = []
    resumed = run(callbacks=[records.append], **options)
    assert resumed.history == whole.history
    # The record of step 15 was under way when the run was killed, in the call after.
    assert [r.pop("replayed", False) for r in records[:5]] == 4 * [True] + [False]
    assert records == whole.history
    chex.assert_trees_all_equal(host(resumed.student), host(whole.student))
    chex.assert_trees_all_equal(host(resumed.best), host(whole.best))
    # A finished run taken up again has nothing left to do.
    assert run(checkpoint_dir=tmp_path / "cut", log_every=3).history == whole.history


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tmp_path):
    whole = run()
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, callbacks=[kill_at(18)], save_every=0)
    # What orbax leaves when the process dies inside save(): a folder with a temporary name.
    torn = tmp_path / "last" / "18.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "tree").write_bytes(b"half")
    resumed = run(checkpoint_dir=tmp_path)
    assert resumed.history == whole.history
    chex.assert_trees_all_equal(host(resumed.student), host(whole.student))


def test_resuming_with_another_network_says_so(tmp_path):
    run(checkpoint_dir=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="is of another network, optimizer or average"):
        fit(mlp(1, width=9), data(), batch_size=16, epochs=2, checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    x, labels = data()
    late = lambda step: jnp.where(step < 8, 0.01, jnp.inf)  # noqa: E731
    options = {"teacher": mlp(0), "metric": "l2", "batch_size": 16, "epochs": 3}
    with pytest.raises(NonFiniteLoss, match="not finite at step 9"):
        fit(mlp(1), (x, labels), coef=late, checkpoint_dir=tmp_path, **options)
    kept = fit(mlp(1), (x, labels), coef=0.01, checkpoint_dir=tmp_path, **options)
    assert [r["step"] for r in kept.history] == [6, 12, 18]
    assert all(np.isfinite(r["loss"]) for r in kept.history)


def test_augmentation_and_the_result_do_not_depend_on_the_number_of_devices():
    def jitter(x, keys):
        return x if keys is None else x + jax.vmap(lambda k: jax.random.normal(k, (D,)))(keys)

    one, four = (
        run(preprocess=jitter, devices=jax.devices()[:n], optimizer=optax.sgd(0.05)) for n in (1, 4)
    )
    for a, b in zip(one.history, four.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["test_accuracy"] == b["test_accuracy"]
    plain = run(devices=jax.devices()[:1], optimizer=optax.sgd(0.05))
    assert plain.history[0]["loss"] != pytest.approx(one.history[0]["loss"], rel=1e-4)


def test_several_steps_a_call_as_on_an_accelerator(monkeypatch):
    one = run(optimizer=optax.sgd(0.05))
    monkeypatch.setattr(training._plan, "steps_per_call", lambda *given: 3)
    three = run(optimizer=optax.sgd(0.05))
    assert [r["step"] for r in three.history] == [r["step"] for r in one.history]
    for a, b in zip(one.history, three.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_max_steps_evaluates_where_it_stops():
    history = run(max_steps=8, log_every=4).history
    assert [(r["step"], "test_accuracy" in r) for r in history] == [
        (4, False),
        (6, True),
        (8, True),
    ]


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    assert run(epochs=1).history == run(epochs=1).history != run(epochs=1, seed=6).history


def test_balanced_batches_hold_runs_of_a_class():
    labels = np.random.default_rng(0).integers(0, 20, 400)
    batches = Batches((np.arange(400)[:, None], labels), 32, seed=0, devices=1, per_class=4)
    orders = [[np.ravel(rows) for (rows, _), _ in batches.epoch(epoch, 1)] for epoch in (0, 0, 1)]
    np.testing.assert_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0][0], orders[2][0])
    for batch in orders[0]:
        counts = np.bincount(labels[batch], minlength=20)
        assert len(batch) == 32 and (counts % 4 == 0).all()
    seen = np.concatenate(orders[0])
    assert len(np.unique(seen)) == len(seen) > 300
    assert run(per_class=4, epochs=1).history[-1]["step"] <= 6


def test_a_network_of_ones_own_comes_back_as_its_variables():
    wrapped = from_nnx(mlp(1))
    result = fit(Network(wrapped.init, wrapped.apply), data(), epochs=1, batch_size=16)
    params, _state = result.student
    chex.assert_trees_all_equal(result.state.params, params)


def test_a_projector_is_trained_with_the_student_and_left_out_of_what_comes_back(tmp_path):
    wide = models.MLP((16, 12), 3, in_features=D, rngs=nnx.Rngs(0))
    options = {"teacher": wide, "batch_size": 16, "epochs": 3, "optimizer": optax.sgd(0.05)}
    with pytest.raises(ValueError, match=r"kd2m_jax\.projected, or use losses\.gw2"):
        fit(mlp(1), data(), metric="cw2", **options)
    options |= {"metric": "cw2", "coef": 0.1}
    result = fit(projected(mlp(1), 12), data(), checkpoint_dir=tmp_path, **options)
    assert result.history[-1]["distillation_loss"] < result.history[0]["distillation_loss"]
    _, projector = result.state.params
    before = projected(mlp(1), 12).init(jax.random.split(jax.random.key(0))[0], data()[0])[0][1]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, projector)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert isinstance(result.student, models.MLP)
    assert result.student(data()[0]).features.shape == (N, 6)
    # It is in the checkpoint: taken up again, nothing is left to do and nothing differs.
    again = fit(projected(mlp(1), 12), data(), checkpoint_dir=tmp_path, **options)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, again.state.params[1]),
                                jax.tree.map(np.asarray, projector))  # fmt: skip


def test_a_projector_is_clipped_together_with_the_student():
    wide = models.MLP((16, 12), 3, in_features=D, rngs=nnx.Rngs(0))
    network, lr = projected(mlp(1), 12), 0.1
    before, _ = network.init(jax.random.split(jax.random.key(0))[0], jnp.asarray(data()[0]))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr))
    options = {"teacher": wide, "metric": "l2", "coef": 100.0, "batch_size": 16, "max_steps": 1}
    after = fit(network, data(), optimizer=optimizer, **options).state.params
    moved = jax.tree.map(lambda a, b: a - b, after, before)
    assert optax.tree.norm(moved) == pytest.approx(lr, rel=1e-4)  # of both at once
    assert all(0.01 * lr < optax.tree.norm(part) < 0.999 * lr for part in moved)


def test_a_projected_linen_student_comes_back_without_its_projector():
    class Student(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(6)(x)))
            return x, nn.Dense(3)(x)

    wide = models.MLP((16, 12), 3, in_features=D, rngs=nnx.Rngs(0))
    options = {"teacher": wide, "metric": "cw2", "coef": 0.1, "batch_size": 32, "epochs": 1}
    result = fit(projected(Student(), 12), data(), **options)
    assert set(result.student) == {"params", "batch_stats"}
    assert set(result.student["params"]) == {"Dense_0", "BatchNorm_0", "Dense_1"}
    features, logits = Student().apply(result.student, data()[0], train=False)
    assert features.shape == (N, 6) and np.isfinite(logits).all()


def test_a_metric_that_draws_gets_a_new_key_each_step():
    batch = [data()]  # the same one each step, and a student that stays as it is
    options = {"teacher": mlp(0), "metric": "sw2:projections=4", "optimizer": optax.sgd(0.0)}
    values = [
        [r["distillation_loss"] for r in fit(mlp(1), batch, epochs=4, **options).history]
        for _ in range(2)
    ]
    assert len(set(values[0])) == 4
    assert values[0] == values[1]


def test_a_projector_of_maps_is_trained_kept_and_left_out(tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32)
    labels = np.arange(32) % 3

    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.conv = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
            self.head = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            maps = nnx.relu(self.conv(x))
            features = maps.mean((1, 2))
            return features, self.head(features), (maps,)

    student, teacher = Net(4, nnx.Rngs(1)), Net(6, nnx.Rngs(0))
    options = {"teacher": teacher, "metric": "wkd-f", "batch_size": 16, "epochs": 3}
    options |= {"optimizer": optax.sgd(0.05), "checkpoint_dir": tmp_path}
    with pytest.raises(ValueError, match="with a projector"):
        fit(student, (x, labels), **options)
    network = projected(student, channels=6)
    result = fit(network, (x, labels), **options)
    values = [r["distillation_loss"] for r in result.history]
    assert values[-1] < 0.9 * values[0]
    before = network.init(jax.random.split(jax.random.key(0))[0], x)
    for mine, old in zip(result.state.variables, before, strict=True):  # and the BatchNorm's state
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), mine[1], old[1])
        assert min(jax.tree.leaves(moved)) > 1e-5
    assert isinstance(result.student, Net)
    assert result.student(x)[2][0].shape == (32, 4, 4, 4)
    again = fit(network, (x, labels), **options)
    chex.assert_trees_all_equal(host_of(again.state.variables), host_of(result.state.variables))


def host_of(tree):
    return jax.tree.map(np.asarray, tree)


def test_a_projector_of_maps_matches_the_teachers_channels():
    net = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
    x = jnp.ones((4, 8, 8, 1))
    network = projected(net, channels=5)
    params, state = network.init(jax.random.key(0), x)
    out, moved = network.apply(params, state, x, train=True, rng=jax.random.key(1))
    assert out.maps[-1].shape == (4, 2, 2, 5) and out.features.shape == (4, 64)
    assert out.maps[-1].min() >= 0  # the ReLU
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state[1], moved[1])
    assert all(jax.tree.leaves(changed))  # the BatchNorm's statistics are state
    with pytest.raises(ValueError, match="it has none"):
        projected(mlp(0), channels=5).init(jax.random.key(0), data()[0])
    with pytest.raises(ValueError, match="a size of at least 1"):
        projected(net)


def test_a_loss_that_is_not_finite_at_once_is_hinted_at():
    with pytest.raises(NonFiniteLoss, match=r"at step 1 .*inputs not finite"):
        fit(mlp(1), (np.full((16, D), np.inf), np.zeros(16, int)), epochs=1, batch_size=16)


def test_a_result_is_written_as_a_line():
    result = fit(mlp(1), data(), epochs=1, batch_size=16, eval_data=data(1))
    accuracy = result.history[-1]["test_accuracy"]
    records = len(result.history)
    expected = f"FitResult(MLP, {records} records, last test_accuracy {accuracy:.3f})"
    assert repr(result) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 500}, r"batch_size 500 is larger than the data \(96\)"),
        ({"per_class": 5}, "per_class must divide batch_size 16, got 5"),
        ({"batch_size": 10}, "a batch of 10 does not split evenly over 4 devices"),
        ({"teacher": mlp(0), "metric": None}, "come together, and metric is missing"),
        ({"teacher": None, "metric": "w2"}, "come together, and teacher is missing"),
        (
            {"teacher": Network(*from_nnx(mlp(0))[:2]), "metric": "w2"},
            r"trained variables are needed \(teacher_variables of fit\)",
        ),
        ({"data": (np.ones((4, D)), np.zeros(3, int))}, "4 inputs, but 3 labels"),
        ({"data": (np.ones((16, D)), np.full(16, -2))}, "class numbers from 0 on, got -2"),
        ({"data": np.ones((16, D))}, r"data must be \(x, labels\) or .*, got one array"),
    ],
)
def test_mistakes_are_named(options, message):
    arguments = {"data": data(), "epochs": 1, "batch_size": 16} | options
    with pytest.raises(ValueError, match=message):
        fit(mlp(1), arguments.pop("data"), **arguments)
    with pytest.raises(TypeError, match=r"a model is a flax\.nnx\.Module"):
        fit(lambda x: x, data())


def test_a_cpu_does_not_trace_the_accelerators_solver(monkeypatch):
    """Which takes time, and imports ott-jax."""

    def refuse(*_, **options):
        raise NotImplementedError("Sinkhorn")

    monkeypatch.setattr("kd2m_jax.losses._couplings.transport_plan", refuse)
    x, labels = (a[:12] for a in data())  # so many are in no other program
    metric = "w2+cw2:epsilon=0.02"
    fit(mlp(1), (x, labels), teacher=mlp(0, 32), metric=metric, batch_size=12, max_steps=1)
    with pytest.raises(NotImplementedError, match="Sinkhorn"):
        losses.w2(x, x)
