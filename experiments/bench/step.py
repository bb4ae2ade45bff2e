"""What a metric adds to a training step: the same step without one, the teacher's pass kept."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kd2m_jax import (
    Outputs,
    fit,
    from_nnx,
    init_state,
    losses,
    make_train_step,
    models,
    projected,
)

from ..data.augment import preprocess
from ..data.load import load
from . import answers, measure

# Teacher, student, and the images: a shape means random images and untrained networks.
PAIRS = (("resnet8", "mlp-32-64", "digits"), ("resnet20", "resnet8", (32, 32, 3)))
TARGETS = {("resnet20", "resnet8"): 1.1}
# Passes over the digits. The teacher is trained, the student on its way, because a metric's
# iterations depend on how alike the two are.
EPOCHS = (8, 2)

Pair = tuple[str, str, str | tuple[int, ...]]


def step(
    out: str, pairs: Sequence[Pair] = PAIRS, batch: int = 128, repeats: int = 20
) -> tuple[list[dict], list[str]]:
    """Return rows and notes, for every metric that suits the networks."""
    del out  # no plot
    rows, notes = [], []
    for pair in pairs:
        rows += (timed := beside_none(pair, list(losses.METRICS), batch, repeats))
        notes += worst_case(timed, f"{pair[0]} to {pair[1]}", TARGETS.get(pair[:2]))
        if not isinstance(pair[2], str):
            notes.append(f"{pair[0]} to {pair[1]}: random images, networks not trained.")
    return rows, notes


def worst_case(rows: list[dict], title: str, target: float | None) -> list[str]:
    """Write notes on the metric that adds most, and on metrics whose answers are wrong."""
    worst = max(rows, key=lambda row: row["ratio"])
    title = f"{title}, step with {worst['metric']} over none, the most"
    wrong = [row["metric"] for row in rows if row.get("answer") == "WRONG"]
    note = f"{title}: {worst['ratio']:.2f}"
    if target:
        note = measure.verdict(title, worst["ratio"], target)
    return [note, *([f"WRONG answers: {', '.join(wrong)}"] if wrong else [])]


def beside_none(
    pair: Pair, metrics: Sequence[str], batch: int, repeats: int, dtype=jnp.float32
) -> list[dict]:
    """Return rows of a step without a metric and with each, timed in turn."""
    *networks, x, labels = setting(pair, batch, dtype)
    teacher, student = map(from_nnx, networks)
    variables = teacher.init(None, x)
    seen_by_teacher = teacher.apply(*variables, x, train=False, rng=None)[0]
    out = student.apply(*student.init(None, x), x, train=True, rng=None)[0]
    name = {"teacher": pair[0], "student": pair[1], "batch": batch, "dtype": jnp.dtype(dtype).name}
    cases = []
    for metric in ("none", *metrics):
        columns, network = name | {"metric": metric}, student
        if metric != "none":
            if "maps" in losses.METRICS[metric].needs and not (out.maps and seen_by_teacher.maps):
                continue
            if metric == "wkd-f":  # its projector is part of the method, also at equal sizes
                network = projected(student, channels=seen_by_teacher.maps[-1].shape[-1])
            columns |= answers.answer(metric, out, seen_by_teacher, labels)
        cases.append(measure.Case(columns, once(*program(network, teacher, x, labels, metric))))
    # A round of all takes 12 s where a step takes half a second, and ratios of three rounds say
    # nothing about a tenth.
    return measure.ratios(measure.in_turn(cases, repeats, 150.0))


def setting(pair: Pair, batch: int, dtype=jnp.float32):
    """Return teacher, student, images and labels."""
    names, data = pair[:2], pair[2]
    if not isinstance(data, str):
        networks = [build(name, data, seed, dtype) for seed, name in enumerate(names)]
        x = jax.random.normal(jax.random.key(0), (batch, *data))
        return *networks, x, jnp.arange(batch) % 10
    digits = load("digits")
    prepare, (images, labels) = preprocess(digits), digits.train
    networks = [
        fit(
            build(name, images.shape[1:], seed, dtype),
            digits.train,
            preprocess=prepare,
            epochs=epochs,
        ).student
        for seed, (name, epochs) in enumerate(zip(names, EPOCHS, strict=True))
    ]
    return *networks, prepare(images[:batch], None), jnp.asarray(labels[:batch])


def build(name: str, shape, seed: int, dtype=jnp.float32) -> nnx.Module:
    """Build a network for ten classes by its name, untrained."""
    rngs = nnx.Rngs(seed)
    return models.build(name, num_classes=10, image_shape=shape, rngs=rngs, dtype=dtype)


def program(network, teacher, x, labels, metric: str):
    """Return a compiled step, and the state, teacher's variables and batch that it takes."""
    optimizer = optax.sgd(0.01, momentum=0.9)
    run = make_train_step(
        network,
        teacher,
        optimizer,
        metric=_look_at_teacher if metric == "none" else losses.get_metric(metric),
        coef=1e-3,
    )
    state = init_state(network, optimizer, x, key=jax.random.key(0))
    arguments = (state, teacher.init(None, x), (x, labels))
    return jax.jit(run, donate_argnums=0).lower(*arguments).compile(), *arguments


def once(run, state, variables, batch):
    """Return a function that makes the program's next step and waits for it."""

    def make_one():
        nonlocal state  # the step donates it
        state, scores = run(state, variables, batch)
        jax.block_until_ready((state, scores))

    return make_one


class _Look(losses.Metric):
    """No distance, but the teacher's output is read: XLA would leave out its forward pass."""

    @property
    def needs(self):
        """Return what it takes beyond features: nothing that any network may lack."""
        return ()

    def __call__(self, student, teacher, labels=None, *, labels_t=None, where=None, key=None):
        """Return the mean of the teacher's features and logits."""
        del student, labels, labels_t, where, key
        assert isinstance(teacher, Outputs)
        return jnp.mean(teacher.features) + jnp.mean(jnp.asarray(teacher.logits))


_look_at_teacher = _Look("none")
