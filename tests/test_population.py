"""Students trained in one program end as each does alone, and the teacher is computed once."""

import chex
import jax
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import fit, from_nnx, init_state, models, step

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
        chex.assert_trees_all_close(*(jax.tree.map(np.asarray, t) for t in (one, other)), rtol=1e-4)


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
    body = step.step_body(student, teacher, optimizer, **options)

    def arithmetic(students):
        states = [init_state(student, optimizer, x, key=jax.random.key(0))] * students
        together = jax.jit(lambda states, *seen: [body(state, *seen) for state in states])
        compiled = together.lower(states, teacher.init(None, x), (x, labels)).compile()
        return compiled.cost_analysis()["flops"]

    # The teacher's two hidden layers alone.
    assert 4 * arithmetic(1) - arithmetic(4) > 3 * 2 * N * 512 * (D + 6)
