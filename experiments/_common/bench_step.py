"""What a metric adds to a training step: the same step without one, the teacher's pass kept."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments._common import bench
from kd2m_jax import from_nnx, init_state, losses, make_train_step, models

METRICS = (
    "w2",
    "cw2",
    "jw2",
    "gaussian-w2",
    "gaussian-cw2",
    "gaussian-kl",
    "gaussian-ckl",
    "sw2",
    "mmd-rbf",
    "kd",
    "l2",
)
# teacher, student, image shape
PAIRS = (("resnet8", "mlp-32-64", (8, 8, 1)), ("resnet20", "resnet8", (32, 32, 3)))


def step(
    out: str,
    pairs: Sequence[tuple[str, str, tuple[int, ...]]] = PAIRS,
    metrics: Sequence[str] = METRICS,
    batch: int = 128,
    repeats: int = 20,
) -> tuple[list[dict], list[str]]:
    """Rows and notes; random images, for their content does not change the time."""
    del out  # no plot
    rows, notes = [], []
    for teacher, student, shape in pairs:
        name = {"teacher": teacher, "student": student, "batch": batch}
        cases = [
            bench.Case({**name, "metric": metric}, _step(teacher, student, shape, batch, metric))
            for metric in ("none", *metrics)
        ]
        rows += (timed := bench.ratios(bench.measure(cases, repeats, 30.0)))
        worst = max(timed, key=lambda row: row["ratio"])
        notes.append(f"{teacher} to {student}: at most {worst['ratio']:.2f} ({worst['metric']})")
    return rows, notes


def _step(teacher: str, student: str, shape: tuple[int, ...], batch: int, metric: str):
    networks = [
        models.build(name, num_classes=10, image_shape=shape, rngs=nnx.Rngs(seed))
        for seed, name in enumerate((teacher, student))
    ]
    teacher_network, network = map(from_nnx, networks)
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    labels = jnp.arange(batch) % 10
    optimizer = optax.sgd(0.01, momentum=0.9)
    run = make_train_step(
        network,
        teacher_network,
        optimizer,
        metric=_look_at_teacher if metric == "none" else losses.get_metric(metric),
        coef=1e-3,
    )
    variables = teacher_network.init(jax.random.key(1), x)
    state = init_state(network, optimizer, x, key=jax.random.key(0))

    def once():
        nonlocal state  # the step donates it
        state, scores = run(state, variables, (x, labels))
        jax.block_until_ready((state, scores))

    return once


class _Look(losses.Metric):
    """No distance, but the teacher's output is read: XLA would leave out its forward pass."""

    def __call__(self, student, teacher, labels=None, *, key=None):
        """The mean of the teacher's features and logits."""
        del student, labels, key
        return sum(jnp.mean(leaf) for leaf in (teacher.features, teacher.logits))


_look_at_teacher = _Look("none")
