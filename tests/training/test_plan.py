"""Students trained in one program end as each does alone, and the teacher is computed once."""

import chex
import jax
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import (
    NonFiniteLoss,
    fit,
    from_nnx,
    init_state,
    models,
    training,
)
from kd2m_jax.internal import step_body
from kd2m_jax.training._body import Batch
from kd2m_jax.training._evaluation import Task, evaluators
from kd2m_jax.training._preprocess import Prepare

N, D = 96, 10
METRICS = ["cw2", "l2", "gaussian-w2"]
COEFS = [0.01, 0.1, 1.0]


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=8):
    return models.MLP((width, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


def run(student, metric, coef, **options):
    options = {"epochs": 3, "batch_size": 16, "eval_data": data(1), "seed": 5} | options
    return fit(student, data(), teacher=mlp(0, 32), metric=metric, coef=coef, **options)


def assert_close(found, expected):
    assert len(found.history) == len(expected.history)
    for one, other in zip(found.history, expected.history, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name in ("student", "best"):
        one, other = (nnx.to_pure_dict(nnx.state(getattr(r, name))) for r in (found, expected))
        # Two programs: an entry near 0 has the rounding of the entries about 0.1 beside it.
        chex.assert_trees_all_close(
            *(jax.tree.map(np.asarray, t) for t in (one, other)), rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_each_student_ends_as_it_would_alone():
    seen = []
    students = [mlp(1), mlp(2), mlp(1, 16)]  # other weights, another network
    together = run(students, METRICS, COEFS, callbacks=[seen.append])
    for i, (result, *one) in enumerate(zip(together, students, METRICS, COEFS, strict=True)):
        assert_close(result, run(*one))
        assert [{**r, "student": i} for r in result.history] == [
            r for r in seen if r["student"] == i
        ]


def test_what_is_no_list_holds_for_all():
    together = run(mlp(1), "cw2", COEFS)
    assert [r.history[0]["coef"] for r in together] == pytest.approx(COEFS)
    assert len({r.history[-1]["loss"] for r in together}) == 3
    with pytest.raises(ValueError, match="lists of students, metrics and coefs differ in length"):
        run([mlp(1), mlp(2)], "cw2", COEFS)
    with pytest.raises(ValueError, match="metric none among others"):
        run(mlp(1), ["none", "cw2"], 0.1)


def test_a_loss_that_is_not_finite_names_its_student():
    with pytest.raises(NonFiniteLoss, match="loss of student 1 is not finite at step 2"):
        run(mlp(1), "l2", [1e-3, 1e35], optimizer=optax.sgd(1e6), max_steps=4)


def test_students_of_one_structure_share_the_program_and_the_data_of_evaluation():
    students = [mlp(1), mlp(2), mlp(1), mlp(1, 16)]
    networks = [from_nnx(student) for student in students]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    made = evaluators(networks, data(1), Prepare.of(None), mesh, Task(classes=3))
    programs = [one.args[0].program for one in made]
    assert programs[0] is programs[1] is programs[2] is not programs[3]
    assert made[0].args[1] is made[3].args[1]


@pytest.mark.slow
def test_students_with_batch_statistics_and_a_preprocess_end_as_they_would_alone():
    rng, labels = np.random.default_rng(0), np.arange(48) % 3
    x = (80 * labels[:, None, None, None] + rng.integers(0, 60, (48, 8, 8, 3))).astype(np.uint8)

    def resnet(seed):
        return models.resnet8(3, rngs=nnx.Rngs(seed))

    def prepare(x, keys):
        if keys is not None:
            flip = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
            x = jax.numpy.where(flip, x[:, :, ::-1], x)
        return x.astype(np.float32) / 128 - 1

    def trained(student, metric, coef):
        return fit(student, (x, labels), teacher=resnet(0), metric=metric, coef=coef, epochs=2,
                   batch_size=16, eval_data=(x, labels), preprocess=prepare,
                   optimizer=optax.sgd(1e-2), seed=5)  # fmt: skip

    students, metrics, coefs = [resnet(1), resnet(2)], ["cw2", "gaussian-w2"], [1e-2, 1e-1]
    together = trained(students, metrics, coefs)
    for result, *one in zip(together, students, metrics, coefs, strict=True):
        assert_close(result, trained(*one))


@pytest.mark.slow
def test_an_interrupted_population_goes_on_to_the_same_bits(tmp_path):
    sgd = {"optimizer": optax.sgd(0.1)}
    run(mlp(1), METRICS, COEFS, checkpoint_dir=tmp_path, max_steps=9, **sgd)
    resumed = run(mlp(1), METRICS, COEFS, checkpoint_dir=tmp_path, **sgd)
    for one, other in zip(resumed, run(mlp(1), METRICS, COEFS, **sgd), strict=True):
        chex.assert_trees_all_equal(one.state.params, other.state.params)


def test_the_teacher_is_computed_once():
    """Arithmetic of four students in one program against four times that of one."""
    (x, labels), optimizer = data(), optax.sgd(0.1)
    student, teacher = from_nnx(mlp(1)), from_nnx(mlp(0, 512))
    options = {"metric": "l2", "coef": 1.0, "task_coef": 1.0, "axis": None}
    body = step_body(student, teacher, optimizer, **options)

    def arithmetic(students):
        states = [init_state(student, optimizer, x, key=jax.random.key(0))] * students
        together = jax.jit(lambda states, *seen: [body(state, *seen) for state in states])
        compiled = together.lower(states, teacher.init(None, x), (x, labels)).compile()
        return compiled.cost_analysis()["flops"]

    # The teacher's two hidden layers alone.
    assert 4 * arithmetic(1) - arithmetic(4) > 3 * 2 * N * 512 * (D + 6)


def test_the_program_of_fit_computes_the_teacher_once():
    """The same of what `fit` runs, over devices and with a preprocess."""
    (x, labels), optimizer, devices = data(), optax.sgd(0.1), jax.devices()
    student, teacher = from_nnx(mlp(1)), from_nnx(mlp(0, 512))
    options = {"metric": "l2", "coef": 1.0, "task_coef": 1.0, "axis": "devices"}
    body = step_body(student, teacher, optimizer, **options)
    rows = np.arange(N).reshape(1, len(devices), -1)

    def arithmetic(students):
        states = [init_state(student, optimizer, x, key=jax.random.key(0))] * students
        prepare = Prepare.of(lambda x, keys: 2 * x)
        program = training._plan._mapped([body] * students, prepare, devices)
        lowered = program.lower(states, teacher.init(None, x), (rows, None), Batch(x, labels))
        return lowered.compile().cost_analysis()["flops"]

    on_each = N // len(devices)
    assert 4 * arithmetic(1) - arithmetic(4) > 3 * 2 * on_each * 512 * (D + 6)
