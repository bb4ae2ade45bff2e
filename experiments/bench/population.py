"""Students trained in one program against one teacher, beside a program per student."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kd2m_jax import from_nnx, init_state, models
from kd2m_jax.internal import step_body

from . import measure

# teacher, student, image shape
PAIRS = (
    ("resnet20", "resnet8", (32, 32, 3)),
    ("mlp-teacher", "mlp-student", (28, 28, 1)),
)
TARGET = 0.7


def population(
    out: str,
    pairs: Sequence[tuple[str, str, tuple[int, ...]]] = PAIRS,
    students: int = 8,
    metric: str = "cw2",
    batch: int = 128,
    repeats: int = 10,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes, on random images because their content does not change the time.

    As in a trade-off the students differ in lambda. A time is of one step of all students.
    """
    del out  # no plot
    rows, notes = [], []
    for teacher, student, shape in pairs:
        name = {"teacher": teacher, "student": student, "batch": batch, "students": students}
        cases = [
            measure.Case(
                {**name, "programs": students // count},
                _steps(teacher, student, shape, batch, metric, students, count),
            )
            for count in (1, students)
        ]
        rows += (timed := measure.ratios(measure.in_turn(cases, repeats, 60.0)))
        ratio = timed[-1]["ratio"]
        notes.append(
            f"{teacher} to {student}: a student's step costs {ratio:.2f} of one in a program of "
            f"its own (target {TARGET})"
        )
    return rows, notes


def _steps(
    teacher: str,
    student: str,
    shape: tuple[int, ...],
    batch: int,
    metric: str,
    students: int,
    together: int,
):
    """Return a function that makes a step of all students, ``together`` of them per program."""
    networks = [
        models.build(name, num_classes=10, image_shape=shape, rngs=nnx.Rngs(seed))
        for seed, name in enumerate((teacher, student))
    ]
    teacher_network, network = map(from_nnx, networks)
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    labels = jnp.arange(batch) % 10
    optimizer = optax.sgd(0.01, momentum=0.9)
    # As `fit` does it: their steps one after another, and XLA computes the teacher once.
    bodies = [
        step_body(
            network,
            teacher_network,
            optimizer,
            metric=metric,
            coef=1e-3 * 2**i,
            task_coef=1.0,
            axis=None,
        )
        for i in range(together)
    ]

    def several(states, variables, batch):
        return [body(s, variables, batch) for body, s in zip(bodies, states, strict=True)]

    run = jax.jit(several, donate_argnums=0)
    variables = teacher_network.init(jax.random.key(1), x)
    state = init_state(network, optimizer, x, key=jax.random.key(0))
    # The step donates them: each has its own.
    groups = [
        [jax.tree.map(jnp.array, state) for _ in range(together)]
        for _ in range(students // together)
    ]

    def once():
        for i, states in enumerate(groups):
            done = jax.block_until_ready(run(states, variables, (x, labels)))
            groups[i] = [state for state, _ in done]

    return once
